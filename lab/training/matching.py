"""`match` of a config: the width, or another number of the model, at which it costs as much as it should.

    by      params | flops | state   what is matched: parameters, operations for a token of task.seq_len, bytes of the state after so many
    target  a number (1M, 250k, 1.5e6), or the name of a model of configs/model, as this experiment has it without words about its model
    tol     the largest relative difference: 1% or 0.01
    knob    the key that is solved: any integer of the model

`compose` calls `solve` (lab/config/composition.py), so that all commands see the solved value. Models are built without numbers, on
torch's meta device. The cost must not fall as the knob grows. Values that the model's constructor refuses are no candidates: the first
two that it takes tell the step, such as the number of heads.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import count
from typing import Any

import torch

from lab.analysis import cost
from lab.config import Composed, ConfigError, MistakeError, build, check, compose
from lab.config.errors import hint
from lab.config.files import options
from lab.config.layers import Layer
from lab.config.overrides import SHELL, parse, places_of
from lab.config.tree import lookup
from lab.training.experiment import build_node

UNITS = {"params": "params", "flops": "FLOPs a token", "state": "bytes of state"}
FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
MOST = 2**13  # steps of the knob


@dataclass(frozen=True)
class Match:
    """The node, checked."""

    by: str
    target: float | str
    tol: float | str = "1%"
    knob: str = "model.d_model"

    @property
    def number(self) -> float | None:
        """The target, where it is no name."""
        return _number(self.target)

    @property
    def tolerance(self) -> float:
        text = str(self.tol)
        number = _number(text.removesuffix("%"))
        assert number is not None
        return number / 100 if text.endswith("%") else number


def solve(composed: Composed, model_at: Callable[[str, int], Any]) -> Layer:
    """The layer with the solved value, on top of those of `composed`. model_at(knob, value): the config of the model with that value.

    MistakeError for a mistake in `match`, and with the nearest possible value where none comes near enough.
    """
    check(composed)
    match, model = _read(composed), composed.choices["model"]
    knob, length = match.knob, _length(composed)
    current = lookup(composed.config, tuple(knob.split(".")))
    assert current is not None

    @cache
    def at(value: int) -> float | None:
        return _cost(json.dumps(model_at(knob, value)), match.by, length)

    try:
        target, goal = _target(match, composed, length)
        best, found = _nearest(at, target, current[0] or 64)
    except NoCandidate as error:
        if error.equal:
            raise MistakeError(("match", "knob"), f"the {UNITS[match.by]} of {model} do not depend on {knob}") from None
        build_node("model", composed.config["model"], None)  # says what is wrong with the model itself
        raise MistakeError(("match", "knob"), f"{model} can be built with no {knob}") from None
    except ConfigError:
        raise
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        said = str(error).partition("\n")[0] or type(error).__name__
        problem = f"{model} cannot be built or run without numbers, on torch's meta device ({said})"
        raise MistakeError(("match",), problem) from error
    if current[0] is not None and at(current[0]) == found:  # a model that matches itself
        best = current[0]
    difference = abs(found - target) / target
    if difference > match.tolerance:
        problem = (
            f"no {knob} of {model} comes within {match.tol} of {goal}; the nearest is {best} with {found:,.0f} ({_percent(difference)})"
        )
        raise MistakeError(("match",), f"{problem}; set match.tol={_percent(difference, up=True)}")
    tree: Any = best
    for name in reversed(knob.split(".")):
        tree = {name: tree}
    given = composed.config["match"]
    unset = {name: value for name, value in asdict(match).items() if name not in given}
    return Layer(f"match: {found:,.0f} {UNITS[match.by]}", tree | ({"match": unset} if unset else {}), {})


def _read(composed: Composed) -> Match:
    given, names = composed.config["match"], [f.name for f in fields(Match)]
    if not isinstance(given, Mapping):
        raise MistakeError(("match",), f"expected {{by: ..., target: ...}} or null, got {given}")
    for name in given:
        if name not in names:
            raise MistakeError(("match", name), f"there is no such key{hint(str(name), names)}")
    for name, right in (("by", f"one of {', '.join(UNITS)}"), ("target", "a number, as 1M, or the name of a model")):
        if given.get(name) is None:
            raise MistakeError(("match", name), f"it is not set; it must be {right}", culprit=("match",))
    match = Match(**given)
    if not isinstance(match.by, str) or match.by not in UNITS:
        raise MistakeError(("match", "by"), f"expected {', '.join(UNITS)}, got {match.by}{hint(str(match.by), UNITS)}")
    if match.number is None and (not isinstance(match.target, str) or match.target not in options()["model"]):
        right = hint(str(match.target), options()["model"])
        raise MistakeError(("match", "target"), f"{match.target} is neither a number, such as 1M, nor a model of configs/model{right}")
    if match.number is not None and not 0 < match.number < math.inf:
        raise MistakeError(("match", "target"), f"it must be above 0, got {match.target}")
    tol = _number(str(match.tol).removesuffix("%"))
    if tol is None or not 0 <= tol < math.inf:
        raise MistakeError(("match", "tol"), f"expected 0 or more, as 1% or 0.01, got {match.tol}")
    key = tuple(str(match.knob).split("."))
    found = lookup(composed.config, key) if key[0] == "model" else None
    if found is None or isinstance(found[0], bool) or not isinstance(found[0], int | None):
        problem = f"expected a key of the model that holds an int, such as model.d_model or model.n_layers, got {match.knob}"
        raise MistakeError(("match", "knob"), problem)
    for word in composed.overrides:
        if not word.startswith("--") and key in places_of(parse(word)):
            raise ConfigError(f"{match.knob} ({SHELL}): match solves it; leave one out, or solve another key with match.knob")
    return match


def _number(value: Any) -> float | None:
    """1e6, "1M", "250k" -> a number; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    found = re.fullmatch(r"((?:\d|\d_(?=\d))*\.?\d+(?:e[+-]?\d+)?)\s*([kmgb]?)", str(value).strip(), re.IGNORECASE)
    return float(found[1]) * FACTORS[found[2].lower()] if found else None


def _length(composed: Composed) -> int:
    """task.seq_len, without building the task where its config says it: that may read data."""
    length = composed.config["task"].get("seq_len")
    return length if isinstance(length, int) else build_node("task", composed.config["task"], None).seq_len


def _target(match: Match, composed: Composed, length: int) -> tuple[float, str]:
    """The number to come near to, and its name in a sentence."""
    unit = UNITS[match.by]
    if match.number is not None:
        return match.number, f"{match.number:,.0f} {unit}"
    words = [word for word in composed.overrides if _is_not_of_the_model(word, composed)]
    try:
        other = compose([*words, f"model={match.target}"], matching=False)
        check(other)
        found = _cost(json.dumps(other.config["model"]), match.by, length)
        if found is None:  # its constructor refuses its values
            build_node("model", other.config["model"], None)
    except ConfigError as error:
        raise MistakeError(("match", "target"), f"{match.target} cannot be a model of this experiment: {error}") from error
    assert found is not None
    return found, f"the {found:,.0f} {unit} of {match.target}"


def _is_not_of_the_model(word: str, composed: Composed) -> bool:
    if word.startswith("--config="):
        return True
    root = re.split(r"[./@]", parse(word).key_or_group)[0]
    return root == "experiment" or (root in composed.config and root not in ("model", "match"))


@cache
def _cost(model: str, by: str, length: int) -> float | None:
    """What the model of this node, as JSON, costs; None where its constructor refuses its values."""
    try:
        with torch.device("meta"):
            built = build(json.loads(model))
    except (ValueError, TypeError):
        return None
    if by == "params":
        return cost.params(built)
    if by == "flops":
        return cost.flops_per_token(built, length)
    size = cost.state_bytes(built, length)
    if size is None:
        raise MistakeError(
            ("match", "by"), f"{type(built).__name__} has no state after {length} tokens here, so it cannot be matched by it"
        )
    return size


class NoCandidate(Exception):
    """equal: they all cost the same; else there is none."""

    def __init__(self, equal: bool) -> None:
        self.equal = equal


def _nearest(at: Callable[[int], float | None], target: float, current: int) -> tuple[int, float]:
    """The value whose cost is nearest to the target, and that cost. at(value): its cost, or None where it is no candidate."""
    taken = (value for value in range(1, 2 * max(current, 64) + 1) if at(value) is not None)
    first = next(taken, None)
    if first is None:
        raise NoCandidate(equal=False)
    step = next(taken, first + 1) - first

    def of(index: int) -> float | None:
        return at(first + index * step)

    def taken_from(index: int) -> tuple[int, float] | None:
        found = ((i, of(i)) for i in range(index, index + 8))
        return next(((i, cost) for i, cost in found if cost is not None), None)

    low, high = (0, at(first) or 0.0), taken_from(max((current - first) // step, 1))
    if high is not None and high[1] == low[1]:
        raise NoCandidate(equal=True)
    while high is not None and high[1] < target:  # twice as wide costs twice as much at least, mostly
        low, wider = high, min(max(math.ceil(high[0] * target / high[1]), high[0] + 1), 8 * high[0], MOST)
        high = taken_from(wider) if wider > low[0] else None
    for turn in count():
        if high is None or low[1] >= target:
            break
        between = range(low[0] + 1, high[0])
        guess = _power(first, step, low, high, target) if turn % 3 < 2 else (low[0] + high[0]) // 2
        middle = next(((i, cost) for i in sorted(between, key=lambda i: abs(i - guess)) if (cost := of(i)) is not None), None)
        if middle is None:
            break
        low, high = (middle, high) if middle[1] < target else (low, middle)
    index, cost = min((one for one in (low, high) if one is not None), key=lambda one: abs(one[1] - target))
    return first + index * step, cost


def _power(first: int, step: int, low: tuple[int, float], high: tuple[int, float], target: float) -> int:
    """Where the target lies on the power law through two (index, cost)."""
    a, b = (first + index * step for index, _ in (low, high))
    exponent = math.log(high[1] / low[1]) / math.log(b / a) if low[1] > 0 else 0.0
    value = a * (target / low[1]) ** (1 / exponent) if exponent > 0 else (a + b) / 2
    return min(max(round((value - first) / step), low[0] + 1), high[0] - 1)


def _percent(share: float, up: bool = False) -> str:
    """0.018 -> 1.8%; up: 2%, not below it."""
    digits = 0 if share >= 0.01 else 1 if share >= 0.001 else 2
    if up:
        return f"{math.ceil(round(100 * share * 10**digits, 6)) / 10**digits:.{digits}f}%"
    return f"{100 * share:.{digits + 1}f}%"
