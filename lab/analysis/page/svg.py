"""A chart as an SVG element. It names no colour: series i has the class `s<i>`, whose colour page.css says for light and for dark paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal
from xml.etree.ElementTree import Element

from lab.analysis.page.markup import el
from lab.analysis.page.studies import thinned

WIDTH, HEIGHT = 400, 262
TOP, RIGHT, BOTTOM, LEFT = 12, 14, 42, 46  # margins
LETTER = 6.3  # the width of one in a label
LINE = 13  # the height of a label
COLOURS = 8
LONGEST = 15  # letters of a label beside its line; the legend has longer ones whole
MOST_MARKS = 24  # of a line
MARKS = (  # of radius 1, so that no series is told by its colour alone
    "M-1,0A1,1 0 1 0 1,0A1,1 0 1 0 -1,0Z", "M-.9-.9H.9V.9H-.9Z", "M0-1.2L1.1,.8H-1.1Z", "M0-1.3L1.2,0L0,1.3L-1.2,0Z",
    "M0,1.2L1.1-.8H-1.1Z", "M-1.1-.5H-.5V-1.1H.5V-.5H1.1V.5H.5V1.1H-.5V.5H-1.1Z", "M-1.2-.6L0-1.2L1.2-.6V.6L0,1.2L-1.2,.6Z",
)  # fmt: skip


@dataclass
class Point:
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""  # the tooltip


@dataclass
class Series:
    label: str
    index: int  # of its colour and its mark
    points: list[Point] = field(default_factory=list)


@dataclass
class Axis:
    """include: values that it has room for. ticks: where they are to be, and their labels; None: where they are round."""

    label: str
    scale: Literal["linear", "log"] = "linear"
    low: float | None = None  # borders that hold, such as the 0 and the 1 of an accuracy
    high: float | None = None
    include: Sequence[float] = ()
    ticks: dict[float, str] | None = None


def chart(
    series: Sequence[Series], x: Axis, y: Axis, alt: str, lines: bool = True, references: Sequence[tuple[str, float]] = ()
) -> Element:
    """lines=False: marks with error bars, each with its name. references: horizontal lines."""
    points = [point for each in series for point in each.points]
    y_values = [*_reach(points, y), *y.include, *([value for _, value in references] if y.scale == "linear" else [])]
    beside = len(series) <= COLOURS and all(len(each.label) <= LONGEST for each in series)
    right = RIGHT + (LETTER * max(len(each.label) for each in series) + 8 if beside and lines else 0)
    x_values = [*(p.x for p in points), *x.include]
    x_ticks, x_place = _axis(x, x_values, LEFT, WIDTH - right, None if lines else 0.08)
    y_ticks, y_place = _axis(y, y_values, HEIGHT - BOTTOM, TOP, 0.06)
    svg = el("svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=alt)
    svg.extend(_frame(x_ticks, y_ticks, x_place, y_place, x.label, WIDTH - right))
    for label, value in references:
        height = _n(y_place(value))
        svg.append(el("path", d=f"M{LEFT},{height}H{_n(WIDTH - right)}", class_="reference"))
        svg.append(el("text", label, x=LEFT + 4, y=_n(y_place(value) - 4), class_="note"))
    for each in series:
        svg.extend([_band(each, x_place, y_place), _line(each, x_place, y_place)] if lines else [_bars(each, x_place, y_place)])
    for each in series:
        svg.append(_marks(each, x_place, y_place, lines))
    if beside:
        svg.extend(_end_labels(series, y_place, WIDTH - right + 7) if lines else _labels(series, x_place, y_place))
    return svg


def swatch(index: int) -> Element:
    """The colour and the mark of a series, for a legend."""
    mark = el("path", d=MARKS[index % len(MARKS)], transform="translate(11 6) scale(3.6)", class_="mark")
    line = el("path", d="M0,6H22", class_="line", stroke_dasharray=_dash(index))
    return el("svg", line, mark, viewBox="0 0 22 12", class_=f"swatch s{index % COLOURS}", aria_hidden="true")


# ----------------------------------------------------------------------- axes


def _reach(points: Sequence[Point], axis: Axis) -> list[float]:
    """The values that the axis must have room for: the means, and of their intervals what is not far beyond all means. Of two seeds an
    interval is nine times as wide as the spread, and would leave the means no room."""
    turn, back = (math.log10, lambda value: 10**value) if axis.scale == "log" else (float, float)
    means = [turn(p.y) for p in points]
    room = (max(means) - min(means)) * 0.4 or abs(means[0]) * 0.2 or 0.1
    ends = [turn(end) for p in points for end in (p.low, p.high) if end is not None and (axis.scale == "linear" or end > 0)]
    return [back(min(max(value, min(means) - room), max(means) + room)) for value in [*means, *ends]]


def _axis(
    axis: Axis, values: Sequence[float], start: float, end: float, margin: float | None
) -> tuple[dict[float, str], Callable[[float], float]]:
    """Ticks with labels, and the place of a value. margin: how far beyond the values the axis reaches, as a part of it; None: not."""
    turn: Callable[[float], float] = math.log10 if axis.scale == "log" else float
    low, high = turn(min(values)), turn(max(values))
    extra = (high - low) * (margin or 0) or (0 if margin is None and high > low else abs(high) * 0.1 or 0.5)
    low, high = low - extra, high + extra
    if axis.scale == "linear":
        low = axis.low if axis.low is not None and low < axis.low else low
        high = axis.high if axis.high is not None and high > axis.high else high
    scale = (end - start) / (high - low)

    def place(value: float) -> float:
        """Not beyond the frame: an interval may reach beyond 1."""
        turned = turn(value) if axis.scale == "linear" or value > 0 else low
        return start + (min(max(turned, low), high) - low) * scale

    if axis.ticks is not None:
        return axis.ticks, place
    ticks = decades(10**low, 10**high) if axis.scale == "log" else steps(low, high, 5 if axis.label else 6)
    for digits in (3, 4, 5, 6):  # models of one size differ in the last of them
        labels = {tick: short(tick, digits) for tick in ticks}
        if len({*labels.values()}) == len(ticks):
            break
    return labels, place


def steps(low: float, high: float, about: int) -> list[float]:
    """Round numbers between the two, so many or some more or fewer."""
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten between the two, with 2 and 5 of each or all round numbers where those are too few."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        ticks = [digit * 10.0**e for e in exponents for digit in digits if low <= digit * 10.0**e <= high]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // 6)]
    return steps(low, high, 4)


def short(value: float, digits: int = 3) -> str:
    """20k, 1.5M, 0.05"""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.99995 and (size > 1e3 or abs(value) >= 9999.5):
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits + 1}g}"


def _frame(
    x_ticks: dict[float, str], y_ticks: dict[float, str], x_place: Callable[[float], float], y_place: Callable[[float], float],
    label: str, right: float,
) -> list[Element]:  # fmt: skip
    bottom = HEIGHT - BOTTOM
    found = [el("path", d=f"M{LEFT},{_n(y_place(tick))}H{_n(right)}", class_="grid") for tick in y_ticks]
    found += [el("text", text, x=LEFT - 7, y=_n(y_place(tick) + 4), class_="tick y") for tick, text in y_ticks.items()]
    found.append(el("path", d=f"M{LEFT},{bottom}H{_n(right)}", class_="axis"))
    room = -1e9
    for tick, text in sorted(x_ticks.items()):
        place, width = x_place(tick), LETTER * len(text)
        found.append(el("path", d=f"M{_n(place)},{bottom}v4", class_="axis"))
        if place - width / 2 > room:  # labels that would touch are left out
            found.append(el("text", text, x=_n(place), y=bottom + 17, class_="tick x"))
            room = place + width / 2 + 4
    return [*found, el("text", label, x=_n((LEFT + right) / 2), y=HEIGHT - 7, class_="label")]


# ----------------------------------------------------------------------- what is drawn


def _line(series: Series, x: Callable[[float], float], y: Callable[[float], float]) -> Element:
    d = "M" + "L".join(f"{_n(x(p.x))},{_n(y(p.y))}" for p in series.points)
    return el("path", d=d, class_=f"line s{series.index % COLOURS}", stroke_dasharray=_dash(series.index))


def _band(series: Series, x: Callable[[float], float], y: Callable[[float], float]) -> Element:
    there = [(p.x, p.low, p.high) for p in series.points if p.low is not None and p.high is not None]
    border = [f"{_n(x(at))},{_n(y(low))}" for at, low, _ in there] + [f"{_n(x(at))},{_n(y(high))}" for at, _, high in reversed(there)]
    return el("path", d="M" + "L".join(border) + "Z" if len(there) > 1 else "", class_=f"band s{series.index % COLOURS}")


def _bars(series: Series, x: Callable[[float], float], y: Callable[[float], float]) -> Element:
    d = "".join(
        f"M{_n(x(p.x))},{_n(y(p.low))}V{_n(y(p.high))}M{_n(x(p.x) - 3)},{_n(y(p.low))}h6M{_n(x(p.x) - 3)},{_n(y(p.high))}h6"
        for p in series.points
        if p.low is not None and p.high is not None
    )
    return el("path", d=d, class_=f"bar s{series.index % COLOURS}")


def _marks(series: Series, x: Callable[[float], float], y: Callable[[float], float], lines: bool) -> Element:
    group, size = el("g", class_=f"marks s{series.index % COLOURS}"), 3.2 if lines else 5
    for p in thinned(series.points, MOST_MARKS):
        at = f"translate({_n(x(p.x))} {_n(y(p.y))})"
        mark = el("path", d=MARKS[series.index % len(MARKS)], transform=f"scale({size})", class_="mark")
        group.append(el("g", el("title", p.note), el("circle", r=9, class_="hit"), mark, transform=at))
    return group


def _end_labels(series: Sequence[Series], y: Callable[[float], float], x: float) -> list[Element]:
    """Names at the ends of the lines, moved apart where they would overlap."""
    ends = sorted((y(each.points[-1].y) + 4, i) for i, each in enumerate(series) if each.points)
    places = _apart([place for place, _ in ends], TOP + 6, HEIGHT - BOTTOM + 3)
    return [
        el("text", series[i].label, x=_n(x), y=_n(place), class_=f"name s{series[i].index % COLOURS}")
        for place, (_, i) in zip(places, ends, strict=True)
    ]


def _labels(series: Sequence[Series], x: Callable[[float], float], y: Callable[[float], float]) -> list[Element]:
    """Names beside single points: on the side where there is room, above or below what is there already."""
    found, taken = [], [(x(p.x) - 6, x(p.x) + 6, y(p.y) + 4) for each in series for p in each.points]
    for each in sorted(series, key=lambda each: y(each.points[0].y) if each.points else 0):
        if not each.points:
            continue
        at, height, width = x(each.points[0].x), y(each.points[0].y) + 4, LETTER * len(each.label)
        left = at + 10 + width > WIDTH - 4
        start = at - 10 - width if left else at + 10
        tries = [height + sign * step * 0.5 * LINE for step in range(12) for sign in (1, -1)]
        free = [
            place
            for place in tries
            if TOP + 4 < place < HEIGHT - BOTTOM - 2
            and all(start > b or start + width < a or abs(place - other) >= LINE - 1 for a, b, other in taken)
        ]
        place = free[0] if free else height
        taken.append((start, start + width, place))
        found.append(el("text", each.label, x=_n(start), y=_n(place), class_=f"name s{each.index % COLOURS}"))
    return found


def _apart(places: list[float], low: float, high: float) -> list[float]:
    """These in their order, LINE from each other at least, none beyond the two borders if that can be."""
    found: list[float] = []
    for place in places:
        found.append(max(place, low, found[-1] + LINE if found else low))
    for i in range(len(found) - 1, -1, -1):
        found[i] = min(found[i], high - LINE * (len(found) - 1 - i))
    return found


def _dash(index: int) -> str | None:
    return None if index < COLOURS else "5 3" if index < 2 * COLOURS else "2 2"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
