"""docs/performance.md from the figures of the benchmarks, any number of files: those of one allocator may come beside the other's.

python scripts/bench_ops.py --json ops.json
python scripts/bench_models.py --json models.json
python scripts/bench_limits.py --json limits.json
python scripts/bench_docs.py ops.json models.json limits.json > docs/performance.md
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
AIMS = {  # (op, how the name of the other begins): the ratios with the default allocator and with reuse
    ("selective_scan", "mambapy"): (100, 97), ("selective_scan, forward", "mambapy"): (98, 35),
    ("selective_scan, short", "the pub"): (1950, None), ("linear_recurrence", "s5"): (5.5, 17),
    ("linear_recurrence, real", "Python"): (None, 510), ("linear_recurrence, real", "FFT"): (None, 156),
    ("linear_recurrence, real", "chunked"): (None, 100), ("linear_recurrence, per step", "laminarnet"): (None, 14),
    ("ssm_kernel", "the pub"): (None, 418), ("ssm_kernel + fft_conv", "the pub"): (None, 16), ("causal_conv", "conv1d"): (None, 8),
    ("causal_conv, each in its own layout", "conv1d"): (None, 3.5), ("cauchy_kernel", ""): (10, 10),
    ("S4D layer, with GELU and GLU", "the pub"): (25, 25),
}  # fmt: skip
INTRODUCTION = """\
# Performance

What lab's ops and models cost beside other ways to compute the same, on one CPU. This page is written by the benchmarks:

{commands}

| | |
|---|---|
{machine}
| date | {date} |

A ratio is the other's CPU time over lab's, above 1 where lab is faster. Both sides get the same float32 inputs, in one process, in turn,
with the same threads and the same allocator; a time is the median of several. The machine was busy with other work, so process CPU time,
not wall-clock time, is compared; ± is half the distance between the quartiles of the two times, added. The difference is the largest one
between both sides' results (and gradients), as a part of the largest number there. Memory is what one call, or one training step, adds
at its peak, in a process of its own.

Allocator: by default, glibc maps every large tensor anew and gives it back, and each page costs time again. `reuse` keeps the memory
(`mallopt`: no mapping, no trimming), for both sides; in lab-train that is `trainer.reuse_memory=true`.
"""
OPS = """
## Ops

Forward and backward, unless a row says forward. The aim, with the default allocator / with reuse, is what was reached by prototypes on
another machine, or what was hoped for; *What limits them* below says why a row falls short of it. laminarnet's form clamps exponents, so
that long decays come out wrong: the difference is its own error. The published loop's backward pass grows with the square of the length.

| op | against | lab, ms | other, ms | ratio, default | ratio, reuse | ± | lab, MiB | other, MiB | difference | aim |
|---|---|---|---|---|---|---|---|---|---|---|
"""
THREADS = """
### Two threads

Wall-clock time, on a machine with nothing else to do: a second thread gains nothing where both cores are taken. The aim is 1.9.

| op | 1 thread, ms | 2 threads, ms | ratio, default | ratio, reuse |
|---|---|---|---|---|
"""
MODELS = """
## Training steps

Forward, cross-entropy, backward, clipping and AdamW; 4 layers, d_model 256, vocabulary 256, batch {batch}. mambapy and s5-pytorch give the
layer, in lab's trunk; transformers the whole model. Those start from the same weights. laminarnet is the public model of that name at the
same sizes, which computes something else: its recurrence does not turn.

| model | against | L | lab, ms | other, ms | ratio, default | ratio, reuse | ± | lab, MiB | other, MiB | difference |
|---|---|---|---|---|---|---|---|---|---|---|
"""
GROWTH = """
## Growth with the length

A training step of batch 1, otherwise as above; the exponent is the slope of the best line through log cost over log length, 1 is linear.

| model | allocator | time | memory | {lengths} |
|---|---|---|---|{bars}
"""
LIMITS = """
## What limits them

Forward passes at B 4, L 1024, E 512, N 16: what an op cannot do without (exponentials, or bytes read and written once) over its time,
beside the rate of the plainest operation of PyTorch that does nothing else.

The aims for the ops were taken on another machine, whose vector arithmetic seems to be faster: the prototypes behind them, built on this
one, were no faster than lab. The scans are bound by that arithmetic, the other packages by memory and dispatch, so the ratios are smaller
here. Half of lab's time of the short real recurrence is the dispatch of a custom operator with its gradient, 0.5 ms at any size. The layer
of S4D cannot reach its aim at this width: its output projection, three matrix products of 4.3 GFLOP that both sides compute alike, takes
more than two thirds of the time that 25 times would leave, at the rate of the plain matrix product below.

| op | allocator | rate | of the ceiling |
|---|---|---|---|
"""
SHARES = """
A training step as above, batch 4, by torch.profiler: the largest shares of its CPU time.

| model | L | allocator | shares |
|---|---|---|---|
"""


def figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def paired(rows: list[Row], *keys: str) -> list[tuple[Row, str, str]]:
    """For each thing measured: a row, of the default allocator where there is one, and the ratios of both allocators."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), {})[row["allocator"]] = row
    ratios = [[figure(pair.get(name, {}).get("ratio")) for name in ("default", "reuse")] for pair in found.values()]
    return [(pair.get("default") or pair["reuse"], *both) for pair, both in zip(found.values(), ratios, strict=True)]


def aim(row: Row) -> str:
    found = [aims for (name, against), aims in AIMS.items() if row["name"] == name and row["against"].startswith(against)]
    return " / ".join("-" if ratio is None else f"{ratio:g}" for ratio in found[0]) if found else ""


def line(*cells: Any) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |\n"


def compared(row: Row, default: str, reuse: str) -> list[str]:
    if row.get("ratio") is None:
        return [figure(row.get("lab_ms")), row["note"], "", "", "", figure(row.get("lab_mb")), "", ""]
    times, memory = (figure(row["lab_ms"]), figure(row["peer_ms"])), (figure(row["lab_mb"]), figure(row["peer_mb"]))
    return [*times, default, reuse, f"{row['spread']:.0%}", *memory, "" if row["difference"] is None else f"{row['difference']:.0e}"]


def page(reports: list[Row]) -> str:
    models, limits = ([report for report in reports if key in report] for key in ("growth", "limits"))
    ops = [report for report in reports if report not in models + limits]
    machine = "".join(line(key, value) for key, value in reports[0]["machine"].items())
    commands = "\n".join("    " + re.sub(r" --json \S+", "", report["command"]) for report in reports)
    text = INTRODUCTION.format(commands=commands, machine=machine.rstrip(), date=max(report["date"] for report in reports))
    rows = [row for report in ops for row in report["rows"]]
    single = [row for row in rows if "2 threads" not in row["name"]]
    text += OPS
    for row, *ratios in paired(single, "name", "against"):
        text += line(f"{row['name']}, {row['shape']}", row["against"], *compared(row, *ratios), aim(row))
    text += THREADS
    for row, *ratios in paired([row for row in rows if row not in single], "name"):
        text += line(row["name"].removesuffix(", 2 threads"), figure(row.get("peer_ms")), figure(row.get("lab_ms")), *ratios)
    if models:
        rows = [row for report in models for row in report["rows"]]
        text += MODELS.format(batch=rows[0]["batch"])
        for row, *ratios in paired(rows, "name", "against", "length"):
            text += line(row["name"], row["against"], row["length"], *compared(row, *ratios))
        rows = [row for report in models for row in report["growth"]]
        lengths = max((row["lengths"] for row in rows), key=len)
        text += GROWTH.format(lengths=" | ".join(f"{length}: ms, MiB" for length in lengths), bars="---|" * len(lengths))
        for row in rows:
            exponents = [f"{row[key]:.2f}" for key in ("time_exponent", "memory_exponent")]
            each = [f"{figure(ms)}, {figure(mb)}" for ms, mb in zip(row["ms"], row["mb"], strict=True)]
            text += line(row["name"], row["allocator"], *exponents, *each, *[""] * (len(lengths) - len(each)))
    for report in limits:
        text += LIMITS
        for row in report["limits"]:
            share = f"{row['share']:.0%} of {row['against']}" if "against" in row else ""
            text += line(row["name"], row["allocator"], f"{row['rate']:.3g} {row['unit']}", share)
        text += SHARES
        for row in report["shares"]:
            named = ", ".join(f"`{name}` {share:.0%}" for name, share in row["shares"].items())
            text += line(row["name"], row["length"], row["allocator"], named)
    return text


if __name__ == "__main__":
    sys.stdout.write(page([json.loads(Path(file).read_text()) for file in sys.argv[1:]]))
