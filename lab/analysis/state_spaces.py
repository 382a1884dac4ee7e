"""Plots of the state spaces in a run, each a matplotlib Figure (lab/analysis/plots.py), from the snapshots of `callbacks.state_spaces`.

    plot_spectrum(run, step)        the eigenvalues A of each layer, and what a token makes of them: e^{dt A}, or the memory in tokens
    plot_time_steps(run, step)      the histogram of dt in each layer
    plot_selectivity(run, step)     Mamba: dt of each token in some channels, and how much of the state stays
    plot_responses(run, step)       what a unit impulse leaves behind: kernels of S4D and S5; of Mamba, from each token to each later one

A state obeys x' = A x + B u with real or complex A, sampled with step dt: one token multiplies it by e^{dt A}, so that it has decayed to 1/e
after -1 / (dt Re A) tokens, its memory. c = the stored channels, n = states, N = those of Mamba, L = the stored tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator

from lab.analysis.plots import SIZE, Plot, RunPath, save
from lab.analysis.snapshots import read_snapshot
from lab.training.run import RunError

Snapshot = Mapping[str, np.ndarray]
DT_EDGES = np.linspace(-6, 2, 161)  # log10 of dt, the bins of a stored histogram; what lies outside is counted at the ends
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


# ----------------------------------------------------------------------- values


def memory(eigenvalues: np.ndarray, dt: np.ndarray) -> np.ndarray:
    """eigenvalues (c, n, 2), dt (c, 1) or (1, n) -> (c, n) tokens until a state has decayed to 1/e; infinite where it does not decay."""
    with np.errstate(divide="ignore"):
        return 1 / np.maximum(-eigenvalues[..., 0] * dt, 0)


def discrete(eigenvalues: np.ndarray, dt: np.ndarray) -> np.ndarray:
    """eigenvalues (c, n, 2), dt (c, 1) or (1, n) -> e^{dt A} (c, n), complex: what one token makes of a state."""
    return np.exp(dt * (eigenvalues[..., 0] + 1j * eigenvalues[..., 1]))


def decay(eigenvalues: np.ndarray, dt: np.ndarray) -> np.ndarray:
    """Real eigenvalues (c, N, 2), dt (L, c) of each token -> (L, c), the mean of e^{dt A} over the N states: how much of them stays."""
    return np.exp(dt[..., None] * eigenvalues[..., 0]).mean(-1)


def selective_responses(eigenvalues: np.ndarray, dt: np.ndarray, B: np.ndarray, C: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Eigenvalues (c, N, 2), dt (L, c), B, C (L, N) of a sequence, at (S,) tokens -> (L, S, c): what a unit impulse into a channel's state
    space at token s gives at token t, with dt, B and C as they are:  C_t . e^{(dt_{s+1} + ... + dt_t) A} dt_s B_s, 0 before s.

    The state space alone, without the convolution, the skip D and the gate. Its mean over channels is Mamba's hidden attention,
    arXiv:2403.01590.
    """
    A = eigenvalues[..., 0]
    h = np.zeros((len(at), *A.shape), np.float32)
    out = np.zeros((len(dt), *h.shape[:2]), np.float32)
    for t in range(len(dt)):
        h *= np.exp(dt[t, :, None] * A)
        h[at == t] = dt[t, :, None] * B[t]
        out[t] = h @ C[t]
    return out


# ----------------------------------------------------------------------- drawing


def spectrum(snapshot: Snapshot, layers: Sequence[int] | None = None) -> Plot:
    """A column for each layer, a colour for each dt. Complex A: the plane of A, below it e^{dt A} and the unit circle. Mamba, whose A is
    real: -A of each state, below it its memory at the median dt of the channel."""
    shown, note = _layers(snapshot, layers)
    figure, left, right = _figure(1.0, 2.0 * len(shown), 4.8)
    grid = figure.add_gridspec(2, len(shown), left=left, right=right, bottom=0.11, top=0.87, wspace=0.42, hspace=0.36)
    dts = np.concatenate([snapshot[f"dt_{i}"].ravel() for i in shown])
    colours = ScalarMappable(LogNorm(dts.min(), max(dts.max(), 1.01 * dts.min())), "viridis")
    for column, i in enumerate(shown):
        A, dt = snapshot[f"eigenvalues_{i}"], snapshot[f"dt_{i}"]
        top, bottom = (figure.add_subplot(grid[row, column]) for row in (0, 1))
        (_real if f"token_dt_{i}" in snapshot else _complex)(top, bottom, A, dt, colours, len(snapshot["tokens"]))
        top.set_title(f"layer {i}", size=SIZE)
    _bar(figure, colours, right, (0.11, 0.87), "dt")
    figure.suptitle(f"Eigenvalues A of the state spaces, step {int(snapshot['step']):,}{note}", size=SIZE + 1)
    return figure


def _complex(top: Axes, bottom: Axes, A: np.ndarray, dt: np.ndarray, colours: ScalarMappable, length: int) -> None:
    z, angle = discrete(A, dt), np.linspace(0, 2 * np.pi, 200)
    points = {"s": 5, "c": colours.to_rgba(np.broadcast_to(dt, z.shape).ravel()), "linewidths": 0}
    lowest = A[..., 0].min()
    top.scatter(A[..., 0], A[..., 1], **points)
    top.axvline(0, color="crimson", linewidth=0.9)
    top.set_xlim(1.25 * lowest, -0.2 * lowest)
    top.xaxis.set_major_locator(MaxNLocator(3))
    _name(top, "Re A (1 / time)", "Im A (rad / time)")
    bottom.plot(np.cos(angle), np.sin(angle), color="crimson", linewidth=0.9)
    bottom.scatter(z.real, z.imag, **points)
    bottom.set_aspect("equal")
    bottom.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    _name(bottom, "Re exp(dt A)", "Im exp(dt A)")


def _real(top: Axes, bottom: Axes, A: np.ndarray, dt: np.ndarray, colours: ScalarMappable, length: int) -> None:
    states = np.arange(1, A.shape[1] + 1)
    for axes, values in ((top, -A[..., 0]), (bottom, memory(A, dt))):
        axes.add_collection(LineCollection([np.stack([states, line], 1) for line in values], colors=colours.to_rgba(dt[:, 0]), linewidths=1))
        axes.set(yscale="log", xlim=(0.5, states[-1] + 0.5), ylim=(values.min() / 1.3, values.max() * 1.3))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    bottom.axhline(length, color="crimson", linewidth=0.9)
    _name(top, "state n", "-A (1 / time)")
    _name(bottom, "state n", "memory (tokens)")


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
    low, high = DT_EDGES[used[0]], DT_EDGES[used[-1] + 1]
    axes.set(xlim=(np.floor(2 * low) / 2, np.ceil(2 * high) / 2), ylim=(len(layers) - 0.95, -1.05))
    decades = np.arange(np.ceil(axes.get_xlim()[0]), np.floor(axes.get_xlim()[1]) + 1)
    axes.set_xticks(decades, [f"$10^{{{decade:.0f}}}$" for decade in decades])
    axes.set_yticks(range(len(layers)), [f"layer {i}" for i in layers])
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _name(axes, "dt (time per token)", "")
    what = "channels and tokens" if any(name.startswith("token_dt") for name in snapshot) else "channels"
    axes.set_title(f"Time steps dt over {what}, step {int(snapshot['step']):,}; black: the median", size=SIZE + 1)
    return figure


def selectivity(snapshot: Snapshot, layers: Sequence[int] | None = None, tokens: tuple[int, int] | None = None) -> Plot:
    """Two maps for each layer, tokens to the right, channels downwards in the order of their median dt: dt, and how much of the state stays."""
    shown, note = _layers(snapshot, layers, "token_dt", "selective layers: callbacks.state_spaces stores dt per token of Mamba", PANELS // 2)
    names = [_token(name) for name in snapshot["labels"]]
    start, end = (0, LABELS if bool(snapshot["text"]) else len(names)) if tokens is None else tokens
    end = min(end, len(names))
    if not 0 <= start < end:
        raise RunError(f"tokens=({start}, {end}): the snapshot has the tokens 0 to {len(names) - 1}")
    height = 2.7 * len(shown) + 1.1
    figure, left, right = _figure(0.9, 6.6, height)
    bottom, top = 0.6 / height, 1 - 0.5 / height
    grid = figure.add_gridspec(2 * len(shown), 1, left=left, right=right, bottom=bottom, top=top, hspace=0.22)
    dts = np.concatenate([snapshot[f"token_dt_{i}"][start:end].ravel() for i in shown])
    scales = (ScalarMappable(LogNorm(max(dts.min(), 1e-6), max(dts.max(), 1e-5)), "viridis"), ScalarMappable(Normalize(0, 1), "magma"))
    for k, i in enumerate(shown):
        A, dt = snapshot[f"eigenvalues_{i}"], snapshot[f"token_dt_{i}"][start:end]
        extent = (start - 0.5, end - 0.5, dt.shape[1] - 0.5, -0.5)
        for row, (name, values, scale) in enumerate((("dt", dt, scales[0]), ("stays", decay(A, dt), scales[1]))):
            axes = figure.add_subplot(grid[2 * k + row])
            axes.imshow(values.T, cmap=scale.cmap, norm=scale.norm, aspect="auto", interpolation="nearest", extent=extent)
            last = k == len(shown) - 1 and row == 1
            if end - start <= LABELS:
                axes.set_xticks(range(start, end), names[start:end], size=SIZE - 2, parse_math=False, rotation=0 if _short(names) else 90)
            axes.tick_params(labelbottom=last, length=2 if last else 0)
            _name(axes, ("token" if end - start <= LABELS else "token t") if last else "", f"layer {i}: {name}\nchannel")
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            prompt_len = int(snapshot["prompt_len"])
            if start < prompt_len <= end:
                axes.axvline(prompt_len - 1, color="crimson", linewidth=1.2)
    middle = (bottom + top) / 2
    _bar(figure, scales[0], right, (middle + 0.03, top), "dt (time per token)")
    _bar(figure, scales[1], right, (bottom, middle - 0.03), "mean of exp(dt A)")
    figure.suptitle(f"Selectivity: dt, and the share of the state that stays, step {int(snapshot['step']):,}{note}", size=SIZE + 1)
    return figure


def responses(snapshot: Snapshot, layers: Sequence[int] | None = None) -> Plot:
    """A panel for each layer. S4D, S5: the kernel of some channels, each divided by its largest value. Mamba: the mean over some channels of
    the size of the response at token t to an impulse at token s, dt, B and C being those of the first sample, divided by the largest."""
    shown, note = _layers(snapshot, layers)
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    height = 2.6 * rows + 0.9
    figure, left, right = _figure(0.8, 2.7 * columns, height)
    bottom, top = 0.55 / height, 1 - 0.6 / height
    grid = figure.add_gridspec(rows, columns, left=left, right=right, bottom=bottom, top=top, wspace=0.35, hspace=0.42)
    signed, size = ScalarMappable(Normalize(-1, 1), "RdBu_r"), ScalarMappable(Normalize(0, 1), "viridis")
    kinds = set()
    for k, i in enumerate(shown):
        axes = figure.add_subplot(grid[divmod(k, columns)])
        kinds.add(f"token_dt_{i}" in snapshot)
        if f"token_dt_{i}" in snapshot:
            _pairs(axes, snapshot, i, size)
        else:
            _kernels(axes, snapshot[f"kernel_{i}"], signed)
        axes.set_title(f"layer {i}", size=SIZE)
    middle = (bottom + top) / 2
    if False in kinds:
        _bar(figure, signed, right, (middle + 0.05 if len(kinds) == 2 else bottom, top), "kernel / its largest value")
    if True in kinds:
        bar = _bar(figure, size, right, (bottom, middle - 0.05 if len(kinds) == 2 else top), "|response| / the largest")
        ticks = np.array([0, 0.01, 0.1, 0.25, 0.5, 1])
        bar.set_ticks(list(ticks**0.5), labels=[f"{tick:g}" for tick in ticks])
    figure.suptitle(f"Impulse responses, step {int(snapshot['step']):,}{note}", size=SIZE + 1)
    return figure


def _kernels(axes: Axes, kernel: np.ndarray, scale: ScalarMappable) -> None:
    """kernel (1 or 2, c, L): the second one looks back, from lag -1 on."""
    both = kernel[0] if len(kernel) == 1 else np.concatenate([kernel[1, :, ::-1], kernel[0]], 1)
    past = both.shape[1] - kernel.shape[2]
    values = both / np.maximum(np.abs(both).max(1, keepdims=True), 1e-30)
    extent = (-past - 0.5, kernel.shape[2] - 0.5, len(both) - 0.5, -0.5)
    axes.imshow(values, cmap=scale.cmap, norm=scale.norm, aspect="auto", interpolation="nearest", extent=extent)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _name(axes, "lag (tokens)", "channel")


def _pairs(axes: Axes, snapshot: Snapshot, layer: int, scale: ScalarMappable) -> None:
    A, dt, B, C = (snapshot[f"{name}_{layer}"] for name in ("eigenvalues", "token_dt", "B", "C"))
    length = len(dt)
    at = np.unique(np.linspace(0, length - 1, min(length, IMPULSES)).round().astype(int))
    sizes = np.abs(selective_responses(A, dt, B, C, at)).mean(-1)  # (L, S)
    sizes = np.where(np.arange(length)[:, None] >= at, sizes / max(sizes.max(), 1e-30), np.nan)
    axes.imshow(sizes**0.5, cmap=scale.cmap, norm=scale.norm, aspect="auto", interpolation="nearest", extent=(-0.5, length - 0.5) * 2)
    axes.set_ylim(length - 0.5, -0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
    prompt_len = int(snapshot["prompt_len"])
    if 0 < prompt_len <= length:
        axes.axvline(prompt_len - 1, color="crimson", linewidth=0.7)
        axes.axhline(prompt_len - 1, color="crimson", linewidth=0.7)
    _name(axes, "impulse at token s", "response at token t")


# ----------------------------------------------------------------------- parts of a drawing


def _layers(
    snapshot: Snapshot, wanted: Sequence[int] | None, needs: str = "dt", missing: str = "state spaces", most: int = PANELS
) -> tuple[list[int], str]:
    """The layers to draw, and a note where they are not all."""
    there = [int(i) for i in snapshot["layers"] if f"{needs}_{i}" in snapshot]
    if not there:
        raise RunError(f"the snapshot has no {missing}")
    if wanted is None:
        shown = [there[k] for k in np.unique(np.linspace(0, len(there) - 1, min(len(there), most)).round().astype(int))]
        return shown, "" if shown == there else f", {len(shown)} of {len(there)} layers"
    for i in wanted:
        if i not in there:
            raise RunError(f"layers: the snapshot has no layer {i} to draw; there are {', '.join(map(str, there))}")
    return list(wanted), ""


def _figure(before: float, width: float, height: float) -> tuple[Plot, float, float]:
    """A figure whose panels are `width` inches wide, with room for labels before and a colour bar behind; its left and right borders."""
    whole = before + width + 1.05
    return Plot(figsize=(whole, height), dpi=100), before / whole, (before + width) / whole


def _bar(figure: Plot, scale: ScalarMappable, right: float, span: tuple[float, float], label: str) -> Any:
    wide = figure.get_figwidth()
    bar = figure.colorbar(scale, cax=figure.add_axes((right + 0.15 / wide, span[0], 0.12 / wide, span[1] - span[0])))
    bar.ax.tick_params(labelsize=SIZE - 1)
    bar.set_label(label, size=SIZE)
    return bar


def _name(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, size=SIZE)
    axes.set_ylabel(y, size=SIZE)
    axes.tick_params(labelsize=SIZE - 1)


def _token(text: str) -> str:
    """What stands for a token under a map: white space as a sign, and a box for what has no picture in every font."""
    return "".join({" ": "\u2423", "\n": "\u21b5"}.get(sign, sign if sign.isprintable() and ord(sign) < 0x250 else "\u25a1") for sign in text)


def _short(names: Sequence[str]) -> bool:
    return max(map(len, names)) <= 1
