"""Tables of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree.ElementTree import Element

from lab.analysis.page.markup import Child, el
from lab.analysis.page.svg import short
from lab.analysis.report import number

SHORT = "short"  # a form of numbers: 66k, 1.5M


def table(head: Sequence[str], rows: Sequence[Sequence[Child]], caption: str, sortable: bool = True) -> Element:
    """It scrolls in a container of its own where the page is too narrow for it."""
    numbers = {i for i in range(1, len(head)) if sortable and all(is_number(row[i]) for row in rows)}
    bodies = [el("tbody", el("tr", *cells_of(row, numbers))) for row in rows]
    kind = "sortable" if sortable and len(rows) > 1 else None
    return scrolling(el("table", el("caption", caption), head_of(head, numbers), *bodies, class_=kind))


def head_of(names: Sequence[str], numbers: set[int]) -> Element:
    return el("thead", el("tr", *(el("th", name, scope="col", class_="number" if i in numbers else None) for i, name in enumerate(names))))


def cells_of(row: Sequence[Child], numbers: set[int]) -> list[Element]:
    cells = (el("td", cell, class_="number" if i in numbers else None) for i, cell in enumerate(row[1:], 1))
    return [el("th", row[0], scope="row"), *cells]


def scrolling(inner: Element) -> Element:
    return el("div", inner, class_="scroll", tabindex="0", role="region", aria_label=str(inner[0].text))


def cell(value: Any, form: str | None = None) -> Element | None:
    """A number, with all of its digits for sorting."""
    if value is None:
        return None
    if not isinstance(value, int | float):
        return el("span", str(value))
    text = short(value) if form == SHORT else form.format(value) if form else number(value)
    return el("span", text, data_v=value)


def is_number(shown: Child) -> bool:
    return shown is None or (isinstance(shown, Element) and (shown.get("data-v") is not None or shown.text == "—"))
