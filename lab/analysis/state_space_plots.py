"""Plots of the state spaces in a run, each a matplotlib Figure (lab/analysis/plots.py), from the snapshots of `callbacks.state_spaces`.

    plot_spectrum(run, step)        the eigenvalues A of each layer, and what a token makes of them: e^{dt A}, or the memory in tokens
    plot_time_steps(run, step)      the histogram of dt in each layer
    plot_selectivity(run, step)     Mamba: dt of each token in some channels, and how much of the state stays
    plot_responses(run, step)       what a unit impulse leaves behind: kernels of S4D and S5; of Mamba, from each token to each later one

Panels of one kind share their axes, side by side: training waits for these pictures, and what takes time is axes and ticks. Logarithmic
axes and colours are linear ones of logarithms, since a logarithmic axis draws ten times as many ticks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from lab.analysis.plots import SIZE, Plot, RunPath, save
from lab.analysis.snapshots import read_snapshot
from lab.analysis.state_spaces import DT_EDGES, decay, discrete, memory, selective_responses, two_sided
from lab.training.run import RunError

Snapshot = Mapping[str, np.ndarray]
PANELS = 6  # layers in one picture, unless they are named
LABELS = 64  # tokens that still have room for their names
IMPULSES = 128  # tokens of a long sequence from which Mamba's responses are computed


def plot_spectrum(logdir: RunPath, step: int | None = None, layers: Sequence[int] | None = None, output: RunPath | None = None) -> Plot:
    """The eigenvalues in the snapshot nearest to `step` (None: the last one). layers: None takes up to six, evenly spaced."""
    return save(spectrum(read_snapshot(logdir, "state_spaces", step), layers), output)


def plot_time_steps(logdir: RunPath, step: int | None = None, output: RunPath | None = None) -> Plot:
    """The histogram of dt in every layer: over channels (S4D), states (S5), or channels and tokens (Mamba)."""
    return save(time_steps(read_snapshot(logdir, "state_spaces", step)), output)


def plot_selectivity(
    logdir: RunPath,
    step: int | None = None,
    layers: Sequence[int] | None = None,
    tokens: tuple[int, int] | None = None,
    output: RunPath | None = None,
) -> Plot:
    """dt and decay per token of the first sample. tokens: from, and up to but without; None: all of a short one, the first 64 of a text."""
    return save(selectivity(read_snapshot(logdir, "state_spaces", step), layers, tokens), output)


def plot_responses(logdir: RunPath, step: int | None = None, layers: Sequence[int] | None = None, output: RunPath | None = None) -> Plot:
    """The impulse responses in the snapshot nearest to `step` (None: the last one)."""
    return save(responses(read_snapshot(logdir, "state_spaces", step), layers), output)


# ----------------------------------------------------------------------- drawing


def spectrum(snapshot: Snapshot, layers: Sequence[int] | None = None) -> Plot:
    """A panel for each layer, a colour for each dt. Complex A: the plane of A, below it e^{dt A} and the unit circle. Mamba, whose A is
    real: -A of each state, below it its memory at the median dt of the channel."""
    shown, note = _layers(snapshot, layers)
    groups = _groups(snapshot, shown)
    figure, areas = _figure([1.75 * len(group) for group in groups.values()], 5.15)
    dts = np.log10(np.concatenate([snapshot[f"dt_{i}"].ravel() for i in shown]))
    colours = ScalarMappable(Normalize(dts.min() - 0.01, dts.max() + 0.01), "viridis")  # of log10 dt
    for (selective, group), (left, width) in zip(groups.items(), areas, strict=True):
        top, bottom = (figure.add_axes((left, low, width, 0.34)) for low in (0.55, 0.1))
        spaces = [(snapshot[f"eigenvalues_{i}"], snapshot[f"dt_{i}"]) for i in group]
        (_real if selective else _complex)(top, bottom, spaces, colours)
        if selective:
            _length(bottom, len(snapshot["tokens"]))
        for k, i in enumerate(group):
            top.text((k + 0.5) / len(group), 1.03, f"layer {i}", transform=top.transAxes, size=SIZE, ha="center")
    bar = _bar(figure, colours, (0.1, 0.89), "dt (time per token)")
    bar.set_ticks(**_powers(*colours.get_clim()))
    figure.suptitle(f"Eigenvalues A, step {int(snapshot['step']):,}{note}", size=SIZE + 1)
    return figure


def _complex(top: Axes, bottom: Axes, spaces: list[tuple[np.ndarray, np.ndarray]], colours: ScalarMappable) -> None:
    widest = max(-A[..., 0].min() for A, _ in spaces)
    mark = float(f"{0.9 * widest:.1g}")
    angle, places = np.linspace(0, 2 * np.pi, 100), np.arange(len(spaces))
    for k, (A, dt) in enumerate(spaces):
        z = discrete(A, dt)
        points: dict[str, Any] = {"s": 5, "c": colours.to_rgba(np.log10(np.broadcast_to(dt, z.shape).ravel())), "linewidths": 0}
        top.scatter(k + A[..., 0] / (1.4 * widest), np.arcsinh(A[..., 1]), **points)
        top.axvline(k, color="crimson", linewidth=0.9)
        bottom.scatter(2.4 * k + z.real, z.imag, **points)
        bottom.plot(2.4 * k + np.cos(angle), np.sin(angle), color="crimson", linewidth=0.9)
    top.set_xlim(-0.85, len(spaces) - 0.85)
    top.set_xticks(np.append(places - mark / (1.4 * widest), places), [f"-{mark:g}"] * len(spaces) + ["0"] * len(spaces))
    lowest, highest = (bound(A[..., 1].min() if bound is min else A[..., 1].max() for A, _ in spaces) for bound in (min, max))
    ticks = np.array([-(10.0**power) for power in range(5, -1, -1)] + [0] + [10.0**power for power in range(6)])
    ticks = ticks[(ticks >= lowest) & (ticks <= highest)]
    top.set_yticks(np.arcsinh(ticks), [f"{tick:,.0f}" for tick in ticks])  # even around 0, logarithmic far from it
    _name(top, "Re A (1 / time)", "Im A (rad / time)")
    bottom.set(xlim=(-1.2, 2.4 * len(spaces) - 1.2), ylim=(-1.2, 1.2), yticks=(-1, 0, 1))
    bottom.set_xticks(np.concatenate([2.4 * places - 1, 2.4 * places + 1]), ["-1"] * len(spaces) + ["1"] * len(spaces))
    _name(bottom, "Re exp(dt A)", "Im exp(dt A)")


def _real(top: Axes, bottom: Axes, spaces: list[tuple[np.ndarray, np.ndarray]], colours: ScalarMappable) -> None:
    n = max(A.shape[1] for A, _ in spaces)
    width, places = 1.2 * n + 1, np.arange(len(spaces))
    for axes, values in ((top, [-A[..., 0] for A, _ in spaces]), (bottom, [memory(A, dt) for A, dt in spaces])):
        values = [np.log10(np.clip(lines, 1e-9, 1e9)) for lines in values]
        for k, (lines, (_, dt)) in enumerate(zip(values, spaces, strict=True)):
            states = k * width + np.arange(1, lines.shape[1] + 1)
            colour = colours.to_rgba(np.log10(dt[:, 0]))
            axes.add_collection(LineCollection([np.stack([states, line], 1) for line in lines], colors=colour, linewidths=1))
        limits = min(lines.min() for lines in values) - 0.1, max(lines.max() for lines in values) + 0.1
        axes.set(xlim=(1 - 0.1 * n, len(spaces) * width - 0.1 * n), ylim=limits)
        axes.set_yticks(**_powers(*limits))
        axes.set_xticks(np.append(places * width + 1, places * width + n), ["1"] * len(spaces) + [str(n)] * len(spaces))
    _name(top, "state n", "-A (1 / time)")
    _name(bottom, "state n", "memory (tokens)")


def _length(axes: Axes, length: int) -> None:
    """A line at the length of the sequence."""
    (low, high), place = axes.get_ylim(), np.log10(length)
    if low < place < high:
        axes.axhline(place, color="crimson", linewidth=0.9)
        axes.text(axes.get_xlim()[1], place, "length ", color="crimson", size=SIZE - 1, ha="right", va="bottom")


def time_steps(snapshot: Snapshot) -> Plot:
    """A histogram for each layer, the first on top, its highest bin as high as the others'; a tick at its median."""
    layers = [int(i) for i in snapshot["layers"]]
    counts = np.array([snapshot[f"dt_counts_{i}"] for i in layers])  # (layers, bins)
    used = np.flatnonzero(counts.any(0))
    figure = Plot(figsize=(5.4, 1.3 + min(0.55 * len(layers) + 0.5, 6)), dpi=100)
    axes = figure.add_axes((0.14, 0.55 / figure.get_figheight(), 0.82, 1 - 0.95 / figure.get_figheight()))
    for row, count in enumerate(counts):
        axes.stairs(row - 0.9 * count / count.max(), DT_EDGES, baseline=row, fill=True, color="tab:blue", alpha=0.75, linewidth=0)
        median = DT_EDGES[np.searchsorted(count.cumsum(), count.sum() / 2) + 1]
        axes.plot([median, median], [row, row - 0.9], color="black", linewidth=1)
    limits = DT_EDGES[used[0]] - 0.1, DT_EDGES[used[-1] + 1] + 0.1
    axes.set(xlim=limits, ylim=(len(layers) - 0.95, -1.05))
    axes.set_xticks(**_powers(*limits))
    axes.set_yticks(range(len(layers)), [f"layer {i}" for i in layers])
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _name(axes, "dt (time per token)", "")
    what = "channels and tokens" if any(name.startswith("token_dt") for name in snapshot) else "channels"
    axes.set_title(f"dt over {what}, step {int(snapshot['step']):,} (black: the median)", size=SIZE + 1)
    return figure


def selectivity(snapshot: Snapshot, layers: Sequence[int] | None = None, tokens: tuple[int, int] | None = None) -> Plot:
    """Two maps for each layer, tokens to the right, channels downwards, the first and the last named by their median dt: dt of each token
    as a multiple of it, and how much of the state stays."""
    shown, note = _layers(snapshot, layers, "token_dt", "selective layers: callbacks.state_spaces stores dt per token of Mamba")
    names = [_token(name) for name in snapshot["labels"]]
    start, end = (0, LABELS if bool(snapshot["text"]) else len(names)) if tokens is None else tokens
    end = min(end, len(names))
    if not 0 <= start < end:
        raise RunError(f"tokens=({start}, {end}): the snapshot has the tokens 0 to {len(names) - 1}")
    ratios = [np.log10(snapshot[f"token_dt_{i}"][start:end] / snapshot[f"dt_{i}"][:, 0]).T for i in shown]  # (c, L)
    stays = [decay(snapshot[f"eigenvalues_{i}"], snapshot[f"token_dt_{i}"][start:end]).T for i in shown]
    most = max(np.log10(2), *(np.abs(ratio).max() for ratio in ratios))
    scales = ScalarMappable(Normalize(-most, most), "RdBu_r"), ScalarMappable(Normalize(0, 1), "magma")

    figure, ((left, width),) = _figure([6.6], 2.4 * len(shown) + 1.2)
    bottom, top = 0.6 / figure.get_figheight(), 1 - 0.5 / figure.get_figheight()
    axes = figure.add_axes((left, bottom, width, top - bottom))
    parts, places, labels, row = [], [], [], 0
    for i, ratio, stay in zip(shown, ratios, stays, strict=True):
        dt = snapshot[f"dt_{i}"][:, 0]
        for what, values, scale, gap in (("dt", ratio, scales[0], 2), ("decay", stay, scales[1], 4)):
            parts += [scale.to_rgba(values), np.zeros((gap, end - start, 4))]  # transparent
            places += [row, row + len(values) - 1]
            labels += [f"{dt[0]:.2g}", f"{dt[-1]:.2g}"]
            axes.text(
                -0.075, row + len(values) / 2 - 0.5, f"layer {i}\n{what}", size=SIZE, rotation=90, ha="right", va="center",
                transform=axes.get_yaxis_transform(), multialignment="center",
            )  # fmt: skip
            row += len(values) + gap
    picture = np.concatenate(parts[:-1])
    axes.imshow(picture, aspect="auto", interpolation="nearest", extent=(start - 0.5, end - 0.5, len(picture) - 0.5, -0.5))
    axes.set_yticks(places, labels)
    axes.spines[:].set_visible(False)
    _name(axes, "token t", "")
    if end - start <= LABELS:  # as texts, since ticks take five times as long
        turned = 90 * (max(map(len, names[start:end])) > 1)
        axes.set_xticks([])
        axes.xaxis.labelpad = 18 if turned else 12
        under: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "size": SIZE - 2, "rotation": turned, "ha": "center", "va": "top"}
        for t in range(start, end):
            axes.text(t, -0.008, names[t], parse_math=False, **under)
    if start < int(snapshot["prompt_len"]) <= end:
        axes.axvline(int(snapshot["prompt_len"]) - 1, color="crimson", linewidth=1.2)
    middle = (bottom + top) / 2
    bar = _bar(figure, scales[0], (middle + 0.03, top), "dt / the median of the channel")
    bar.set_ticks(**_powers(-most, most))
    _bar(figure, scales[1], (bottom, middle - 0.03), "exp(dt A), mean over states")
    title = f"Selectivity: dt of each token and what stays of the state; {len(ratios[0])} channels by their median dt"
    figure.suptitle(f"{title}, step {int(snapshot['step']):,}{note}", size=SIZE + 1)
    return figure


def responses(snapshot: Snapshot, layers: Sequence[int] | None = None) -> Plot:
    """A panel for each layer. S4D, S5: the kernel of some channels, each divided by its largest value. Mamba: the mean over some channels
    of the size of the response at token t to an impulse at token s, dt, B and C being those of the first sample, divided by the largest."""
    shown, note = _layers(snapshot, layers)
    groups = _groups(snapshot, shown)
    figure, areas = _figure([2.3 * len(group) for group in groups.values()], 3.6)
    for (selective, group), (left, width) in zip(groups.items(), areas, strict=True):
        axes = figure.add_axes((left, 0.15, width, 0.66))
        scale = ScalarMappable(Normalize(0, 1), "viridis") if selective else ScalarMappable(Normalize(-1, 1), "RdBu_r")
        (_pairs if selective else _kernels)(axes, snapshot, group, scale)
        axes.spines[:].set_visible(False)
        span = (0.15, 0.81) if len(groups) == 1 else (0.53, 0.81) if selective else (0.15, 0.43)
        bar = _bar(figure, scale, span, "|response| (relative)" if selective else "kernel (relative)")
        if selective:
            ticks = np.array([0, 0.01, 0.1, 0.25, 0.5, 1])
            bar.set_ticks(list(ticks**0.5), labels=[f"{tick:g}" for tick in ticks])
    figure.suptitle(f"Impulse responses, step {int(snapshot['step']):,}{note}", size=SIZE + 1)
    return figure


def _kernels(axes: Axes, snapshot: Snapshot, layers: list[int], scale: ScalarMappable) -> None:
    panels, firsts = [], []
    for i in layers:
        kernel = two_sided(snapshot[f"kernel_{i}"])
        panels.append(kernel / np.maximum(np.abs(kernel).max(1, keepdims=True), 1e-30))
        firsts.append(snapshot[f"kernel_{i}"].shape[2] - kernel.shape[1])
    _mosaic(axes, layers, panels, firsts, scale)
    axes.set_yticks([])
    ordered = all(
        len(snapshot[f"dt_{i}"]) == len(panel) for i, panel in zip(layers, panels, strict=True)
    )  # each channel has a dt of its own
    _name(axes, "lag (tokens)", f"{len(panels[0])} channels" + (", dt rising downwards" if ordered else ""))


def _pairs(axes: Axes, snapshot: Snapshot, layers: list[int], scale: ScalarMappable) -> None:
    panels = []
    for i in layers:
        A, dt, B, C = (snapshot[f"{name}_{i}"] for name in ("eigenvalues", "token_dt", "B", "C"))
        length = len(dt)
        at = np.unique(np.linspace(0, length - 1, min(length, IMPULSES)).round().astype(int))
        sizes = np.abs(selective_responses(A, dt, B, C, at)).mean(-1)  # (L, S)
        sizes = sizes[:, np.searchsorted(at, np.arange(length), side="right") - 1]  # of a long sequence, each stands for those after it
        panels.append(np.where(np.tri(length, dtype=bool), (sizes / max(sizes.max(), 1e-30)) ** 0.5, np.nan))
    places = _mosaic(axes, layers, panels, [0] * len(panels), scale)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    delimiter = int(snapshot["prompt_len"]) - 1
    if 0 <= delimiter < length:
        axes.axhline(delimiter, color="crimson", linewidth=0.7)
        axes.vlines([place + delimiter for place in places], -0.5, length - 0.5, color="crimson", linewidth=0.7)
    _name(axes, "impulse at token s", "response at token t")


def _mosaic(axes: Axes, layers: list[int], panels: list[np.ndarray], firsts: list[int], scale: ScalarMappable) -> list[int]:
    """Panels (rows, columns) of layers side by side, whose columns are numbered from `firsts` on; the places of the numbers 0 in it."""
    rows, gap = max(map(len, panels)), max(1, panels[0].shape[1] // 8)
    parts = [np.pad(panel, ((0, rows - len(panel)), (0, gap)), constant_values=np.nan) for panel in panels]
    low, high = scale.get_clim()
    axes.imshow(np.concatenate(parts, 1)[:, :-gap], cmap=scale.cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    starts = np.cumsum([0, *(part.shape[1] for part in parts)])
    ticks: dict[int, str] = {}
    for layer, start, first, panel in zip(layers, starts, firsts, panels, strict=False):
        last = panel.shape[1] - 1
        axes.text(start + last / 2, 1.03, f"layer {layer}", transform=axes.get_xaxis_transform(), size=SIZE, ha="center")
        ticks |= {int(start - first + number): str(number) for number in (first, 0, first + last)}
    axes.set_xticks(list(ticks), list(ticks.values()))
    return [int(start - first) for start, first in zip(starts, firsts, strict=False)]


# ----------------------------------------------------------------------- parts of a drawing


def _layers(snapshot: Snapshot, wanted: Sequence[int] | None, needs: str = "dt", missing: str = "state spaces") -> tuple[list[int], str]:
    """The layers to draw, and a note where they are not all."""
    there = [int(i) for i in snapshot["layers"] if f"{needs}_{i}" in snapshot]
    if not there:
        raise RunError(f"the snapshot has no {missing}")
    if wanted is None:
        shown = [there[k] for k in np.unique(np.linspace(0, len(there) - 1, min(len(there), PANELS)).round().astype(int))]
        return shown, "" if shown == there else f", {len(shown)} of {len(there)} layers"
    for i in wanted:
        if i not in there:
            raise RunError(f"layers: the snapshot has no layer {i} to draw; there are {', '.join(map(str, there))}")
    return list(wanted), ""


def _groups(snapshot: Snapshot, layers: list[int]) -> dict[bool, list[int]]:
    """The layers by whether they are selective, which says how they are drawn."""
    groups: dict[bool, list[int]] = {}
    for i in layers:
        groups.setdefault(f"token_dt_{i}" in snapshot, []).append(i)
    return groups


def _figure(widths: list[float], height: float) -> tuple[Plot, list[tuple[float, float]]]:
    """A figure with areas of these widths in inches, room for labels before each and for a colour bar behind the last; left and width."""
    before, behind = 0.85, 0.95
    whole = sum(widths) + before * len(widths) + behind
    lefts = np.cumsum([before, *(width + before for width in widths[:-1])])
    areas = [(left / whole, width / whole) for left, width in zip(lefts, widths, strict=True)]
    return Plot(figsize=(whole, height), dpi=100), areas


def _bar(figure: Plot, scale: ScalarMappable, span: tuple[float, float], label: str) -> Any:
    """A colour bar in the room behind the last area, from span[0] up to span[1]."""
    whole = figure.get_figwidth()
    bar = figure.colorbar(scale, cax=figure.add_axes((1 - 0.83 / whole, span[0], 0.12 / whole, span[1] - span[0])))
    bar.ax.tick_params(labelsize=SIZE - 1)
    bar.set_label(label, size=SIZE)
    return bar


def _powers(low: float, high: float) -> dict[str, Any]:
    """Ticks for values whose log10 lie between low and high: powers of ten, or where these are few, also 2 and 5 times them."""
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    values = [factor * 10.0**power for power in range(int(np.floor(low)), int(np.ceil(high)) + 1) for factor in factors]
    ticks = [value for value in values if low - 1e-9 <= np.log10(value) <= high + 1e-9]
    return {"ticks": np.log10(ticks), "labels": [f"{tick:g}" for tick in ticks]}


def _name(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, size=SIZE)
    axes.set_ylabel(y, size=SIZE)
    axes.tick_params(labelsize=SIZE - 1)


def _token(text: str) -> str:
    """What stands for a token under a map: white space as a sign, and a box for what has no picture in every font."""
    return "".join(
        {" ": "\u2423", "\n": "\u21b5"}.get(sign, sign if sign.isprintable() and ord(sign) < 0x250 else "\u25a1") for sign in text
    )
