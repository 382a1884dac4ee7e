"""How the cost of models grows with the length: time of training, prefill and decoding, memory, state, and the exponents of all.

    found = profile(subjects(["mamba", "transformer"], [], **small(lengths)), lengths)      # plain data, for profile.json

At each length the models run in turn, so that a busy machine disturbs all alike; one sequence, float32, on the CPU. Training is forward,
cross-entropy with the losses, and backward. Prefill gives the state and the last logits, as generation asks for them. Decoding continues
a state of that length by STEPS tokens, as generate does: in compiled code where the model has a program, else in PyTorch. Memory is
the rise of the resident memory at its peak, on one thread of a process of its own.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from lab import memory as allocator
from lab.analysis import measuring
from lab.analysis.checkup import WithSource
from lab.analysis.cost import bytes_of
from lab.analysis.statistics import LEVEL
from lab.analysis.subjects import Subject
from lab.config import ConfigError
from lab.models import SequenceModel, evaluating
from lab.models.decoding import Continuation
from lab.ops.interpreter import WORTH, Loaded
from lab.ops.program import Program

STEPS = 16  # tokens that are decoded at each length
VOCABULARY = 256
SIZES = {"d_model": 64, "n_layers": 2}
BUDGET = 1.5  # seconds for each measurement beyond its first round
QUANTITIES = {
    "training_ms": "training, ms",
    "prefill_ms": "prefill, ms",
    "decoding_ms": "a token, ms",
    "training_mib": "training, MiB",
    "prefill_mib": "prefill, MiB",
    "state_bytes": "state, KiB",
}
Side = Callable[[], object]
Peak = Callable[[Callable[[], Side]], float | None]


class Exponent(NamedTuple):
    """b of y = a L^b by least squares through (log L, log y), and its 95 % interval by Student's t: None of fewer than three points."""

    value: float
    low: float | None
    high: float | None


def small(lengths: Sequence[int]) -> dict[str, Any]:
    """What `subjects` is told for these lengths."""
    return {"vocab_size": VOCABULARY, "length": max(lengths) + WORTH, "sizes": SIZES}


def profile(
    subjects: Sequence[Subject],
    lengths: Sequence[int],
    repeats: int = 5,
    clock: Callable[[], float] | None = None,
    peak: Peak = measuring.peak,
    say: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """clock: None takes the CPU's time on one thread, which other processes do not lengthen, and that of the wall on several. A model is
    left out from the length on at which it wants more memory than there is. ConfigError for a length beyond its own."""
    one_thread = torch.get_num_threads() == 1
    clock = clock or (time.process_time if one_thread else time.perf_counter)
    models = {subject.name: subject.make() for subject in subjects}
    for name, model in models.items():
        if model.max_len is not None and model.max_len < max(lengths) + WORTH:
            raise ConfigError(f"{name} was built for {model.max_len} tokens; --lengths {max(lengths)} needs {WORTH} more than that")
    figures: dict[str, dict[str, list[Any]]] = {name: {key: [] for key in QUANTITIES} for name in models}
    too_long: dict[str, int] = {}
    for model in models.values():
        training(model, 2)()  # what a first call imports is imported here, not in every forked process
    # Memory first: a forked process inherits nothing that another measurement left behind.
    for subject in subjects:
        for length in lengths:
            for key, work in (("training_mib", training), ("prefill_mib", prefill)):
                say(f"{subject.name}: memory of {length} tokens")
                used = None
                if subject.name not in too_long and _can(key, models[subject.name]):
                    used = peak(partial(_warm, subject, work, length))
                    if used is None:
                        too_long[subject.name] = length
                figures[subject.name][key].append(used)
    for length in lengths:
        here = {name: model for name, model in models.items() if length < too_long.get(name, math.inf)}
        say(f"time of {length} tokens")
        states = {name: state_at(model, length) for name, model in here.items() if model.causal}
        kinds: dict[str, dict[str, Side]] = {
            "training_ms": {name: training(model, length) for name, model in here.items()},
            "prefill_ms": {name: prefill(here[name], length) for name in states},
            "decoding_ms": {name: steps(here[name], state) for name, state in states.items()},
        }
        for key, sides in kinds.items():
            timings = measuring.in_turn(sides, repeats, BUDGET, clock)
            for name in models:
                ms = timings[name].ms / (STEPS if key == "decoding_ms" else 1) if name in timings else None
                figures[name][key].append(ms)
        for name in models:
            figures[name]["state_bytes"].append(bytes_of(states[name]) if name in states else None)
    return {
        "lengths": list(lengths),
        "machine": {
            "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "allocator": allocator.allocator(), "clock": "CPU" if one_thread else "wall",
        },
        "models": [
            {
                "name": subject.name,
                "parameters": sum(parameter.numel() for parameter in models[subject.name].parameters()),
                "node": subject.node,
                "compiled_decoding": is_compiled(models[subject.name]),
                "left_out_from": too_long.get(subject.name),
                **figures[subject.name],
                "exponents": {key: _as_dict(exponent(lengths, figures[subject.name][key])) for key in QUANTITIES},
            }
            for subject in subjects
        ],
    }  # fmt: skip


def _can(key: str, model: SequenceModel) -> bool:
    return model.causal or key.startswith("training")


def exponent(lengths: Iterable[int], values: Iterable[float | None]) -> Exponent | None:
    """None where fewer than two values are above 0."""
    points = [(math.log(length), math.log(value)) for length, value in zip(lengths, values, strict=True) if value]
    if len(points) < 2:
        return None
    from scipy import stats

    x, y = zip(*points, strict=True)
    if min(y) == max(y):  # scipy's interval would be NaN
        return Exponent(0.0, 0.0, 0.0)
    fit = stats.linregress(x, y)
    if len(points) < 3:
        return Exponent(float(fit.slope), None, None)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(points) - 2) * fit.stderr)
    return Exponent(float(fit.slope), float(fit.slope) - half, float(fit.slope) + half)


def _as_dict(found: Exponent | None) -> dict[str, float | None] | None:
    return None if found is None else found._asdict()


# ---- what is measured


def tokens(length: int) -> Tensor:
    """(1, length), below the vocabulary of any model that there is."""
    return torch.randint(0, 2, (1, length), generator=torch.Generator().manual_seed(0))


def training(model: SequenceModel, length: int) -> Side:
    """Forward, loss and backward."""
    model = _of_tokens(model, length).train()
    text = tokens(length + 1)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        out = model(text[:, :-1], want=("losses",))
        logits = out.y.flatten(0, -2)
        targets = text[:, 1:].flatten() if len(logits) == length else torch.zeros(len(logits), dtype=torch.long)
        (F.cross_entropy(logits, targets) + sum(out.losses.values())).backward()

    return step


def prefill(model: SequenceModel, length: int) -> Side:
    model, text = _of_tokens(model, length), tokens(length)

    def run() -> None:
        with evaluating(model):
            model(text, want=("state", "last"))

    return run


def _warm(subject: Subject, work: Callable[[SequenceModel, int], Side], length: int) -> Side:
    """The work on a model of its own; what is loaded at the first call does not count."""
    model = subject.make()
    work(model, 2)()
    return work(model, length)


def _of_tokens(model: SequenceModel, length: int) -> SequenceModel:
    """An encoder-decoder reads a source as long as the text."""
    return WithSource(model, tokens(length)) if model.takes_source else model


def state_at(model: SequenceModel, length: int) -> Any:
    with evaluating(model):
        return _of_tokens(model, length)(tokens(length), want=("state", "last")).state


def steps(model: SequenceModel, state: Any) -> Side:
    """STEPS tokens, each time from the same position, as `generate` makes them."""
    run = compiled_steps(model, state, STEPS)
    return eager_steps(model, state, STEPS) if run is None else run


def is_compiled(model: SequenceModel) -> bool:
    return model.causal and compiled_steps(model, state_at(model, 2), 1) is not None


def compiled_steps(model: SequenceModel, state: Any, n: int) -> Side | None:
    """n tokens of a program that was made for many, as `generate` makes it; None where the model has none."""
    with evaluating(model):
        logits = torch.zeros(1, 1)  # the last ones: of them only the rows matter
        program = Continuation(model, state, logits, 1 + max(n, WORTH)).program
        if not isinstance(program, Program):
            return None
        loaded, token = Loaded(program), torch.zeros(1, dtype=torch.long)

    def run() -> object:
        loaded.clock[0], loaded.left = 0, n
        return loaded.greedy(token, n)

    return run


def eager_steps(model: SequenceModel, state: Any, n: int) -> Side:
    state = model.reserve(state, n)

    def run() -> None:
        token, now = torch.zeros(1, dtype=torch.long), state
        with evaluating(model):
            for _ in range(n):
                out = model(token[:, None], now, want=("state", "in_place"))
                token, now = out.y[:, 0].argmax(-1), out.state

    return run


# ---- for the eye


def table(found: Mapping[str, Any]) -> Table:
    threads = found["machine"]["threads"]
    drawn = Table(
        title=f"cost by length, one sequence, {threads} thread{'s' if threads > 1 else ''}", title_justify="left",
        caption="grows as L to the power of: least squares through the logarithms, with a 95 % interval", caption_justify="left",
    )  # fmt: skip
    drawn.add_column("")
    drawn.add_column("model", overflow="fold")
    for length in found["lengths"]:
        drawn.add_column(f"L {length:,}", justify="right", no_wrap=True)
    drawn.add_column("L^", justify="right", no_wrap=True, min_width=len("-0.01 ± 0.01"))
    for key, title in QUANTITIES.items():
        for number, model in enumerate(found["models"]):
            scale = 1024 if key == "state_bytes" else 1
            values = ["" if value is None else short(value / scale) for value in model[key]]
            last = number == len(found["models"]) - 1
            drawn.add_row("" if number else title, model["name"], *values, power(model["exponents"][key]), end_section=last)
    return drawn


def short(value: float) -> str:
    """Three digits: 0.0123, 1.23, 123, 12,345."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def power(found: Mapping[str, float | None] | None) -> str:
    if found is None or found["value"] is None:
        return ""
    half = "" if found["high"] is None else f" ± {found['high'] - found['value']:.2f}"
    return f"{found['value']:.2f}{half}"


def notes(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for model in found["models"]:
        decoded = "compiled code" if model["compiled_decoding"] else "PyTorch"
        stateless = all(value is None for value in model["decoding_ms"])
        end = "it has no state, so no prefill and no decoding" if stateless else f"decodes in {decoded}"
        lines.append(f"{model['name']}: {model['parameters']:,} parameters; {end}")
        if model["left_out_from"] is not None:
            lines.append(f"{model['name']}: {model['left_out_from']:,} tokens need more memory than there is")
    return lines
