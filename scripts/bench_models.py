"""What whole models cost: training steps beside other packages, and how time and memory grow with the length.

    python scripts/bench_models.py [--allocator default|reuse|both] [--threads 1] [--only NAME] [--json FILE]

A step is forward, cross-entropy, backward, clipping of the gradient and AdamW, in float32, 4 layers, d_model 256, vocabulary 256. Both
sides start from the same weights and get the same tokens, in one process, in turn; medians of the process CPU time. The difference is the
largest one of the logits, as a part of the largest logit; the memory is what a process of its own needs for the first step at its peak.
Growth: batch 1, of LaminarNet 2 layers of 128, the slope of a line through log time and log memory over log length; 1 is linear.
Peers: pip install .[bench]; a row whose peer is missing says so.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import benchmark
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from lab.analysis import measuring
from lab.files import write_json
from lab.mixers import MambaLayer, S4DLayer, S5Layer
from lab.mixers.base import Mixer, Output, State
from lab.models import Laminar, SequenceModel, Stack

VOCABULARY = 256
MODELS = ("mamba", "s4d", "s5", "laminar")
MIXERS: dict[str, Callable[..., Mixer]] = {"s4d": S4DLayer, "s5": S5Layer}  # of a plain stack
CHUNK = 4096  # tokens of a prefill
SIZES, QUICK = (256, 4), (32, 1)  # d_model, layers
LONG = {"laminar": ((128, 2), 6)}  # sizes and doublings of what grows from 1k to 64k: at full size a step there would need 17 GiB
SLOW, MEMORY = 180.0, 0.5  # CPU seconds and part of the free memory: a side whose step would take more is left out, and its row says so


def lab_model(name: str, d_model: int, n_layers: int) -> SequenceModel:
    torch.manual_seed(0)
    if name == "laminar":
        return Laminar(VOCABULARY, d_model, n_layers=n_layers, dropout=0.0)
    mamba = name == "mamba"
    mixer = partial(MambaLayer, n_layers=n_layers) if mamba else MIXERS[name]
    return Stack(VOCABULARY, d_model, n_layers, mixer, d_ff=0, position="none", norm="rms" if mamba else "layer", tied=mamba)


# ---- the peers, with the weights of lab's model


class MambapyLayer(Mixer):
    def __init__(self, ours: MambaLayer) -> None:
        super().__init__()
        from mambapy.mamba import MambaBlock, MambaConfig

        self.block = MambaBlock(MambaConfig(d_model=ours.out_proj.out_features, n_layers=1))
        self.block.load_state_dict(ours.state_dict())  # the same names

    def mix(self, x: Tensor, state: State, lengths: Tensor | None, want: tuple[str, ...]) -> Output:
        return Output(self.block(x))


class S5PytorchLayer(Mixer):
    """With lab's GELU and gate behind it, for the package has the state space alone."""

    def __init__(self, ours: S5Layer) -> None:
        super().__init__()
        from s5 import S5

        states, d_model, _ = ours.B.shape
        self.ssm, self.gate = S5(d_model, states), ours.gate
        there = self.ssm.seq
        with torch.no_grad():
            there.Lambda.copy_(torch.complex(-ours.log_A_re.exp(), ours.A_im))
            there.log_step.copy_(ours.log_dt.view_as(there.log_step))
            there.B.copy_(ours.B)
            there.C.copy_(2 * torch.view_as_complex(ours.C[0].contiguous()))
            there.D.copy_(ours.D)

    def mix(self, x: Tensor, state: State, lengths: Tensor | None, want: tuple[str, ...]) -> Output:
        g = F.gelu(self.ssm(x))
        return Output(g * torch.sigmoid(self.gate(g)))


def swapped(layer: Callable[[Any], Mixer], model: nn.Module) -> nn.Module:
    """lab's model with another package's layers in it."""
    for block in model.blocks:
        block.mixer = layer(block.mixer)
    return model


class Transformers(nn.Module):
    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        from transformers import MambaConfig, MambaForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()  # every layer warns that it has no CUDA kernel
        config = MambaConfig(
            vocab_size=VOCABULARY, hidden_size=ours.embedding.weight.shape[1], num_hidden_layers=len(ours.blocks), use_cache=False
        )
        self.model = MambaForCausalLM(config)
        names = {"blocks.": "backbone.layers.", "norm1.": "norm.", "embedding.": "backbone.embeddings.", "head.": "lm_head."}
        weights = {"backbone.norm_f.weight": ours.norm.weight}
        for name, value in ours.state_dict().items():
            for here, there in names.items():
                name = name.replace(here, there)
            weights |= {} if name == "norm.weight" else {name: value}
        self.model.load_state_dict(weights)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


def laminarnet(ours: Laminar) -> nn.Module:
    """The public package's model of the same sizes. It computes something else: its recurrence does not turn."""
    import laminarnet as public

    sizes = {"d_model": ours.d_model, "n_heads": ours.n_heads, "n_layers": ours.n_layers, "d_ff": 4 * ours.d_model}
    config = public.LaminarNetConfig(VOCABULARY, n_strata=ours.n_strata, strata_ratios=ours.ratios, dropout=0.0, **sizes)
    return public.LaminarNet(config)


LAMINARNET = benchmark.version("laminarnet")
PEERS: dict[str, dict[str, Callable[[nn.Module], nn.Module]]] = {  # each makes its model of lab's
    "mamba": {benchmark.version("mambapy"): partial(swapped, MambapyLayer), benchmark.version("transformers"): Transformers},
    "s5": {benchmark.version("s5-pytorch"): partial(swapped, S5PytorchLayer)},
    "laminar": {LAMINARNET: laminarnet},
}


# ---- what is measured


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length + 1), generator=torch.Generator().manual_seed(0))


def training_step(model: nn.Module, batch: int, length: int) -> Callable[[], None]:
    optimizer, text = torch.optim.AdamW(model.parameters(), lr=1e-4), tokens(batch, length)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


class Scout:
    """What a longer step would cost, from what shorter ones did: time by the exponent of the last two, memory in proportion."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, float]] = []  # length, seconds, MiB

    def note(self, length: int, seconds: float, memory: float) -> None:
        self.seen.append((length, seconds, memory))

    def too_much(self, length: int) -> str | None:
        (l0, s0, _), (l1, s1, m1) = self.seen[-2:]
        longer = length / l1
        seconds, memory = s1 * longer ** max(1.0, math.log(s1 / s0) / math.log(l1 / l0)), m1 * longer
        if seconds > SLOW:
            return f"left out: a step would take about {seconds:.0f} s"
        if memory > MEMORY * measuring.mebibytes("meminfo", "MemAvailable"):
            return f"left out: a step would need about {memory / 1024:.0f} GiB"
        return None


def peak(make: Callable[[], nn.Module], batch: int, length: int) -> float:
    def prepare() -> Callable[[], None]:
        training_step(make(), 1, 4)()  # what is loaded at the first step does not count
        return training_step(make(), batch, length)

    return measuring.peak(prepare)


def compare(name: str, args: argparse.Namespace) -> list[benchmark.Row]:
    """A row for each peer of a model and each length."""
    batch, sizes, lengths, first = (1, QUICK, (16, 32), (4, 8)) if args.quick else (4, SIZES, (256, 1024, 4096), (64, 128))
    makers: dict[str, Callable[[], nn.Module]] = {"lab": partial(lab_model, name, *sizes)}
    scouts: dict[str, Scout] = {"lab": Scout()}
    missing = {}
    for against, peer in PEERS[name].items():
        try:
            peer(makers["lab"]())
            makers[against], scouts[against] = (lambda peer=peer: peer(makers["lab"]())), Scout()
        except ModuleNotFoundError as error:
            missing[against] = benchmark.missing(error)
    for side, make in makers.items():
        for length in first:
            step = training_step(make(), batch, length)
            step()
            scouts[side].note(length, measuring.seconds(step), peak(make, batch, length))
    rows = []
    for length in lengths:
        notes = missing | {side: note for side, scout in scouts.items() if (note := scout.too_much(length))}
        sides = {side: make() for side, make in makers.items() if side not in notes}
        memory = {side: peak(makers[side], batch, length) for side in sides}
        timings = measuring.in_turn({side: training_step(model, batch, length) for side, model in sides.items()}, args.repeats)
        for side, timing in timings.items():
            scouts[side].note(length, timing.ms / 1e3, memory[side])
        for against in PEERS[name]:
            row: benchmark.Row = {"name": name, "length": length, "batch": batch, "against": against}
            row["note"] = notes.get(against)
            if "lab" in timings:
                row |= {"lab_ms": timings["lab"].ms, "lab_mb": memory["lab"]}
            if against in timings and "lab" in timings:
                lab, peer = timings["lab"], timings[against]
                row |= {"peer_ms": peer.ms, "ratio": peer.ms / lab.ms, "spread": lab.spread + peer.spread}
                row |= {"peer_mb": memory[against], "difference": difference(makers, against)}
            rows.append(row)
    return rows


def difference(makers: dict[str, Callable[[], nn.Module]], against: str) -> float | None:
    """Of the logits of 64 tokens; None of models that compute something else."""
    if against == LAMINARNET:
        return None
    with torch.no_grad():
        ours, theirs = (makers[side]()(tokens(1, 64)) for side in ("lab", against))
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def growth(name: str, args: argparse.Namespace) -> benchmark.Row:
    """Time and memory of a step of batch 1 over the length."""
    sizes, doublings = LONG.get(name, (SIZES, 5))
    title = name if sizes == SIZES else f"{name}, {sizes[1]} layers of {sizes[0]}"
    sizes, lengths = (QUICK, (32, 64, 128)) if args.quick else (sizes, tuple(1024 * 2**i for i in range(doublings + 1)))
    make = partial(lab_model, name, *sizes)
    times, memory = [], []
    for length in lengths:
        times.append(measuring.in_turn({"lab": training_step(make(), 1, length)}, args.repeats, budget=5.0)["lab"].ms)
        memory.append(peak(make, 1, length))
    row = {"name": title, "lengths": lengths, "ms": times, "mb": memory}
    return row | {"time_exponent": slope(lengths, times), "memory_exponent": slope(lengths, memory)}


def slope(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Of the line that fits log values over log lengths best."""
    return float(np.polyfit(np.log(lengths), np.log(np.maximum(values, 1e-9)), 1)[0])


def show(report: dict[str, Any]) -> None:
    table = Table(title="a training step; ratio = the other's CPU time / lab's")
    for column in (
        "model",
        "against",
        "L",
        "B",
        "allocator",
        "lab, ms",
        "other, ms",
        "ratio",
        "spread",
        "lab, MiB",
        "other, MiB",
        "difference",
    ):
        table.add_column(column, justify="left" if column in ("model", "against", "allocator") else "right")
    for row in report["rows"]:
        figures = [benchmark.said(row.get(key)) for key in ("lab_ms", "peer_ms", "ratio", "spread", "lab_mb", "peer_mb", "difference")]
        figures[1] = row["note"] or figures[1]
        table.add_row(row["name"], row["against"], str(row["length"]), str(row["batch"]), row["allocator"], *figures)
    growing = Table(title="growth with the length, batch 1")
    lengths = max((row["lengths"] for row in report["growth"]), key=len, default=[])
    for column in ("model", "allocator", "time", "memory", *(f"L {length}, ms / MiB" for length in lengths)):
        growing.add_column(column, justify="right")
    for row in report["growth"]:
        exponents = [f"L^{row[key]:.2f}" for key in ("time_exponent", "memory_exponent")]
        each = [f"{ms:.3g} / {mb:.3g}" for ms, mb in zip(row["ms"], row["mb"], strict=True)]
        growing.add_row(row["name"], row["allocator"], *exponents, *each)
    Console(width=200).print(table, growing)


def main() -> None:
    args = benchmark.arguments(__doc__.splitlines()[0]).parse_args()

    def rows(allocator: str) -> dict[str, list[benchmark.Row]]:
        compared = [row for name in PEERS if args.only in name for row in compare(name, args)]
        grown = [growth(name, args) for name in MODELS if args.only in name]
        return {key: [{**row, "allocator": allocator} for row in part] for key, part in (("rows", compared), ("growth", grown))}

    report = benchmark.report(benchmark.with_allocator(args.allocator, args.threads, rows), args.threads)
    show(report)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
