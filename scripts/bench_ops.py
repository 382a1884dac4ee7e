"""What the ops cost beside other ways to compute the same: installed packages, and the plain PyTorch forms written out below.

    python scripts/bench_ops.py [--allocator default|reuse|both] [--threads 1] [--only NAME] [--compile] [--json FILE]

For each row: the same float32 inputs, in one process, in turn, medians of the process CPU time; the difference is the largest one of the
results and of all gradients, as a part of the largest number there; the memory is what a fresh process needs for one call at its peak.
Peers: pip install .[bench]; a row whose peer is missing says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import bench_peers
import benchmark
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from lab.analysis import measuring
from lab.files import write_json
from lab.mixers import S4DLayer, S4Layer
from lab.ops import cauchy_kernel, causal_conv, fft_conv, kuramoto_scan, linear_recurrence, selective_scan, ssm_kernel
from lab.ops.kuramoto_scan import reference as kuramoto_loop

Function = Callable[..., Tensor]


class Case(NamedTuple):
    name: str
    shape: str
    inputs: Callable[[], list[Tensor]]
    lab: Function
    peers: Mapping[str, Function]  # of the same inputs; they import their package when they are called
    backward: bool = True
    compared: Function | None = lambda y: y  # what of the result must agree; None: the sides do not compute the same numbers


def cases(quick: bool, compiled: bool = False) -> list[Case]:
    def scan(B: int, L: int, E: int, N: int) -> dict:
        def inputs() -> list[Tensor]:
            steps = [torch.randn(B, L, E), F.softplus(torch.randn(B, L, E) - 2)]
            return [*steps, -torch.randn(E, N).exp(), torch.randn(B, L, N), torch.randn(B, L, N), torch.randn(E)]

        return {"shape": f"B {B}, L {L}, E {E}, N {N}", "inputs": inputs, "lab": lambda *args: selective_scan(*args)[0]}

    def recurrence(B: int, L: int, D: int, per_step: bool = False, dtype: torch.dtype = torch.float32) -> dict:
        def inputs() -> list[Tensor]:
            a = torch.exp(-F.softplus(torch.randn(B, L, D) - 3)) if per_step else torch.rand(D) * 0.5 + 0.5
            return [torch.polar(a, torch.rand(D)) if dtype.is_complex else a, torch.randn(B, L, D, dtype=dtype)]

        return {"shape": f"B {B}, L {L}, D {D}", "inputs": inputs, "lab": lambda a, x: linear_recurrence(a, x)[0]}

    def s4d(H: int, N: int) -> list[Tensor]:
        decay, frequency = torch.full((H, N), -0.5), math.pi * torch.arange(N).expand(H, N)
        dt = torch.logspace(-3, -1, H)[:, None, None]
        return [dt * torch.stack([decay, frequency], -1), torch.randn(H, N, 2)]

    def layer_of(make: type[S4Layer | S4DLayer], form: Function, peer: str, B: int, L: int, H: int, N: int) -> dict:
        layer = make(H, N)
        names = [name for name, _ in layer.named_parameters()]

        def lab(u: Tensor, *parameters: Tensor) -> Tensor:
            return functional_call(layer, dict(zip(names, parameters, strict=True)), (u,))

        def public(u: Tensor, *parameters: Tensor) -> Tensor:
            return form(u, **{name.replace(".", "_"): p for name, p in zip(names, parameters, strict=True)})

        def inputs() -> list[Tensor]:
            layer.reset_parameters()
            return [torch.randn(B, L, H), *(p.detach().clone() for p in layer.parameters())]

        return {"inputs": inputs, "lab": lab, "peers": {peer: public}}

    def sums(H: int, N: int, L: int) -> dict:
        def inputs() -> list[Tensor]:
            return [s4d(H, N)[0] / 2, torch.randn(H, 4, N, 2)]

        peers = {"the public s4.py's form": partial(bench_peers.public_cauchy, length=L)}
        return {"shape": f"H {H}, N {2 * N}, R 4, L {L}", "inputs": inputs, "lab": partial(cauchy_kernel, length=L), "peers": peers}

    def convolution(B: int, L: int, D: int) -> dict:
        return {"shape": f"B {B}, L {L}, D {D}, K 4", "inputs": lambda: [torch.randn(B, L, D), torch.randn(4, D), torch.randn(D)]}

    def oscillators(B: int, L: int, H: int) -> dict:
        def inputs() -> list[Tensor]:
            return [torch.rand(B, H), torch.randn(B, L, H), torch.rand(H), torch.rand(H), torch.randn(H, H) / H]

        return {"shape": f"B {B}, L {L}, H {H}", "inputs": inputs, "lab": lambda *args: kuramoto_scan(*args, dt=0.1)[0]}

    s = 16 if quick else 1  # how much smaller everything is
    L, E, H, P = 1024 // s, 512 // s, 256 // s, 4096 // s
    states = 32 // s
    long = f"B 4, L {P}, H {H}, N {2 * states}"
    peers: dict[str, Function] = {benchmark.version("mambapy"): bench_peers.mambapy_scan}
    compile_too: dict[str, Function] = {"torch.compile of 16 steps": bench_peers.compiled_scan} if compiled else {}
    return [
        Case("selective_scan", **scan(4, L, E, 16), peers={**peers, **compile_too}),
        Case("selective_scan, forward", **scan(4, L, E, 16), peers={**peers, **compile_too}, backward=False),
        Case("selective_scan, short", **scan(4, L // 4, E, 16), peers={"the published reference loop": bench_peers.selecting_loop}),
        Case(
            "linear_recurrence", **recurrence(1, P, H, dtype=torch.complex64), peers={benchmark.version("s5-pytorch"): bench_peers.s5_scan}
        ),
        Case(
            "linear_recurrence, real",
            **recurrence(1, L, 128 // s),
            peers={"Python loop": bench_peers.plain_loop, "FFT": bench_peers.by_fft, "chunked matmul": bench_peers.by_matmul},
        ),
        Case(
            "linear_recurrence, per step",
            **recurrence(4, max(L, 256), H, True),
            peers={"laminarnet 0.7.11's form": bench_peers.laminarnet_scan},
        ),
        Case(
            "ssm_kernel",
            f"H {H}, N {2 * states}, L {P}",
            lambda: s4d(H, states),
            partial(ssm_kernel, length=P),
            {"the public s4d.py's form": partial(bench_peers.public_kernel, length=P)},
        ),
        Case(
            "ssm_kernel + fft_conv",
            long,
            lambda: [torch.randn(4, P, H), *s4d(H, states)],
            lambda u, w, c: fft_conv(u, ssm_kernel(w, c, P)),
            {"the public s4d.py's form": lambda u, w, c: bench_peers.padded_fft(u, bench_peers.public_kernel(w, c, P))},
        ),
        Case(
            "S4D layer, with GELU and GLU",
            long,
            **layer_of(S4DLayer, bench_peers.public_s4d, "the public s4d.py's form", 4, P, H, 2 * states),
        ),
        Case("cauchy_kernel", **sums(H, states, L)),
        Case("cauchy_kernel, forward", **sums(H, states, L), backward=False),
        Case(
            "S4 layer, with GELU and GLU",
            f"B 4, L {L}, H {H}, N {2 * states}",
            **layer_of(S4Layer, bench_peers.public_s4, "the public s4.py's form", 4, L, H, 2 * states),
        ),
        Case(
            "fft_conv",
            f"B 4, L {P}, D {H}",
            lambda: [torch.randn(4, P, H), torch.randn(H, P) / P],
            fft_conv,
            {"torch.fft, padded": bench_peers.padded_fft},
        ),
        Case(
            "causal_conv",
            **convolution(4, L, E),
            lab=lambda x, w, b: causal_conv(x, w, b)[0],
            peers={"conv1d with transposes": lambda x, w, b: bench_peers.conv1d(x.transpose(1, 2), w, b).transpose(1, 2).contiguous()},
        ),
        Case(
            "causal_conv, each in its own layout",
            **convolution(4, L, E),
            lab=lambda x, w, b: causal_conv(x, w, b)[0],
            peers={"conv1d on (B, D, L)": lambda x, w, b: bench_peers.conv1d(x.view(x.shape[0], x.shape[2], -1), w, b)},
            compared=None,  # the numbers are those of another order
        ),
        Case(
            "kuramoto_scan",
            **oscillators(32 // s, 64 // s, 8),
            peers={"Python loop": lambda *args: kuramoto_loop(*args, dt=0.1, form="lattice")[:, :-1]},
            compared=torch.sin,
        ),
    ]  # fmt: skip


def runner(case: Case, function: Function, inputs: list[Tensor]) -> Callable[[], Tensor]:
    """One forward pass, or one forward and one backward."""
    if not case.backward:
        return torch.no_grad()(lambda: function(*inputs))
    with torch.no_grad():
        grad = torch.randn_like(function(*inputs))

    def run() -> Tensor:
        for t in inputs:
            t.grad = None
        y = function(*inputs)
        y.backward(grad)
        return y.detach()

    return run


def difference(case: Case, function: Function, inputs: list[Tensor]) -> float | None:
    """The largest difference between lab's results and gradients and the peer's, as a part of the largest number there."""
    if case.compared is None:
        return None
    sides = []
    for side in (case.lab, function):
        ours = [t.detach().clone().requires_grad_(case.backward) for t in inputs]
        y = case.compared(side(*ours))
        torch.manual_seed(0)
        if case.backward and y.requires_grad:
            y.backward(torch.randn(y.shape, dtype=y.dtype))  # not randn_like, which follows the strides of y
        sides.append([y.detach(), *(t.grad for t in ours if t.grad is not None)])
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in zip(*sides, strict=True))


def prepared(case: Case) -> list[Tensor]:
    torch.manual_seed(0)
    return [t.requires_grad_(case.backward) for t in case.inputs()]


def functions(case: Case) -> dict[str, Function]:
    return {"lab": case.lab, **case.peers}


def absent(small: list[Case]) -> dict[str, str]:
    """Runs everything once, so that it is imported: the peers that are not installed, with what their rows say."""
    notes = {}
    for case in small:
        for name, function in functions(case).items():
            try:
                runner(case, function, prepared(case))()
            except ModuleNotFoundError as error:
                notes[name] = benchmark.missing(error)
    return notes


def peak(case: Case, small: Case, side: str) -> float:
    def prepare() -> Callable[[], Tensor]:
        runner(small, functions(small)[side], prepared(small))()  # what is loaded at the first call does not count
        return runner(case, functions(case)[side], prepared(case))

    return measuring.peak(prepare)


def measure(case: Case, small: Case, missing: Mapping[str, str], repeats: int) -> list[benchmark.Row]:
    """A row for each peer."""
    sides = {name: function for name, function in functions(case).items() if name not in missing}
    memory = {name: peak(case, small, name) for name in sides}
    inputs = prepared(case)
    timings = measuring.in_turn({name: runner(case, f, inputs) for name, f in sides.items()}, repeats)
    lab, rows = timings["lab"], []
    for name, function in case.peers.items():
        row = {"name": case.name, "shape": case.shape, "against": name, "note": missing.get(name)}
        row |= {"lab_ms": lab.ms, "lab_mb": memory["lab"]}
        if name in timings:
            peer = timings[name]
            row |= {"peer_ms": peer.ms, "ratio": peer.ms / lab.ms, "spread": lab.spread + peer.spread}
            row |= {"peer_mb": memory[name], "difference": difference(case, function, inputs)}
        rows.append(row)
    return rows


def table(rows: list[benchmark.Row]) -> Table:
    shown = Table(title="ratio = the other's CPU time / lab's")
    for column in ("op", "against", "allocator", "lab, ms", "other, ms", "ratio", "spread", "lab, MiB", "other, MiB", "difference"):
        shown.add_column(column, justify="left" if column in ("op", "against", "allocator") else "right")
    for row in rows:
        figures = [benchmark.said(row.get(key)) for key in ("lab_ms", "peer_ms", "ratio", "spread", "lab_mb", "peer_mb", "difference")]
        if "ratio" not in row:
            figures[1] = row["note"]
        shown.add_row(f"{row['name']} ({row['shape']})", row["against"], row["allocator"], *figures)
    return shown


def main() -> None:
    parser = benchmark.arguments(__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="torch.compile of 16 steps as a peer too: compiling takes minutes")
    args = parser.parse_args()
    pairs = zip(cases(args.quick, args.compile), cases(True, args.compile), strict=True)
    chosen = [(case, small) for case, small in pairs if args.only in case.name]

    def rows(allocator: str) -> dict[str, list[benchmark.Row]]:
        missing = absent([small for _, small in chosen])
        measured = [row for case, small in chosen for row in measure(case, small, missing, args.repeats)]
        return {"rows": [{**row, "allocator": allocator} for row in measured]}

    report = benchmark.report(benchmark.with_allocator(args.allocator, args.threads, rows), args.threads)
    Console(width=200).print(table(report["rows"]))
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
