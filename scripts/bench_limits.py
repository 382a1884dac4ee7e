"""What limits the ops and the models: their rates beside the machine's own, and where a training step's time goes.

    python scripts/bench_limits.py [--allocator default|reuse|both] [--threads 1] [--json FILE]

A rate is a count that the op cannot do without (bytes read and written, exponentials, multiplications) over its process CPU time; the
ceiling is the rate of the plainest operation of PyTorch that does nothing else. Shares are of the CPU time of a training step, by
torch.profiler.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator

import benchmark
import torch
from bench_models import MODELS, QUICK, SIZES, lab_model, training_step
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from lab.analysis import measuring
from lab.files import write_json
from lab.ops import causal_conv, fft_conv, linear_recurrence, selective_scan

N_SHARES = 6  # operators of a training step that are named; the rest is one line


def ceilings(n: int) -> Iterator[tuple[str, str, float, Callable[[], object]]]:
    """What, unit, how many units a call does, the call."""
    x, y, m = torch.randn(n), torch.empty(n), torch.randn(int(n**0.5), int(n**0.5))
    yield "copy", "GB/s", 8e-9 * n, lambda: y.copy_(x)
    yield "exponential", "G/s", 1e-9 * n, lambda: torch.exp(x, out=y)
    yield "matrix product", "GFLOP/s", 2e-9 * len(m) ** 3, lambda: m @ m


def rates(B: int, L: int, E: int, N: int) -> Iterator[tuple[str, str, str, float, Callable[[], object]]]:
    """Op, the ceiling that it is seen against, unit, units of a call, the call. Forward passes, of float32."""
    u, w = torch.randn(B, L, E), torch.randn(4, E)
    dt, A = torch.rand(B, L, E) * 0.1, -torch.arange(1.0, N + 1).expand(E, N).contiguous()
    of_state = torch.randn(B, L, N)
    decay, K = torch.rand(B, L, E), torch.randn(E, L)
    yield "selective_scan", "exponential", "G/s", 1e-9 * B * L * E * N, lambda: selective_scan(u, dt, A, of_state, of_state, w[0])
    yield "linear_recurrence, per step", "copy", "GB/s", 4e-9 * 3 * B * L * E, lambda: linear_recurrence(decay, u)
    yield "causal_conv", "copy", "GB/s", 4e-9 * 2 * B * L * E, lambda: causal_conv(u, w)
    yield "fft_conv", "copy", "GB/s", 4e-9 * 2 * B * L * E, lambda: fft_conv(u, K, w[0])


def shares(name: str, length: int, quick: bool) -> benchmark.Row:
    """Parts of the CPU time of a training step, batch 4."""
    step = training_step(lab_model(name, *(QUICK if quick else SIZES)), 4, length)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():  # an op's forward pass stands under the name of the function that differentiates it
        times[re.sub(r"^GeneratedBackwardFor_lab_(\w+)_default$", r"lab::\1", event.key)] += event.self_cpu_time_total
    total = sum(times.values())
    largest = sorted(times, key=lambda key: -times[key])[:N_SHARES]
    return {"name": name, "length": length, "shares": {key: times[key] / total for key in largest}}


def main() -> None:
    args = benchmark.arguments(__doc__.splitlines()[0]).parse_args()
    n, shape, length = (4096, (1, 8, 16, 4), 16) if args.quick else (1 << 22, (4, 1024, 512, 16), 1024)

    def rows(allocator: str) -> dict[str, list[benchmark.Row]]:
        sides = {name: call for name, _, _, call in ceilings(n)} | {name: call for name, _, _, _, call in rates(*shape)}
        timings = measuring.in_turn(sides, args.repeats)
        top = {name: units / timings[name].ms * 1e3 for name, _, units, _ in ceilings(n)}
        limits: list[benchmark.Row] = [{"name": name, "unit": unit, "rate": top[name]} for name, unit, _, _ in ceilings(n)]
        for name, against, unit, units, _ in rates(*shape):
            rate = units / timings[name].ms * 1e3
            limits.append({"name": name, "unit": unit, "rate": rate, "against": against, "share": rate / top[against]})
        parts = [shares(name, length, args.quick) for name in MODELS if args.only in name]
        return {key: [{**row, "allocator": allocator} for row in part] for key, part in (("limits", limits), ("shares", parts))}

    report = benchmark.report(benchmark.with_allocator(args.allocator, args.threads, rows), args.threads)
    table = Table("", "allocator", "rate", "unit", "of the ceiling", title="rates, forward")
    for row in report["limits"]:
        share = f"{row['share']:.0%} of {row['against']}" if "against" in row else ""
        table.add_row(row["name"], row["allocator"], f"{row['rate']:.3g}", row["unit"], share)
    parts = Table("model", "allocator", "L", "share of a training step", title="where the time goes")
    for row in report["shares"]:
        parts.add_row(row["name"], row["allocator"], str(row["length"]), ", ".join(f"{k} {v:.0%}" for k, v in row["shares"].items()))
    Console(width=160).print(table, parts)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
