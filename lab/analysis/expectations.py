"""What a comparison is expected to give, as its file says it, and whether it did.

An expectation is a bound on one score of one model, or on what that model has more than another. The verdict is by the interval over
the seeds: all of it within the bound, all of it beyond, or neither. Without the score of one of the seeds there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lab.analysis.report import number
from lab.analysis.statistics import Estimate, estimate, paired_interval
from lab.config.errors import MistakeError, hint, nearest
from lab.config.tree import Key

SPLITS = ("test", "val")


@dataclass(frozen=True)
class Expectation:
    """metric: `test/NAME`, or `val/NAME` at the length of training. length: of the inputs; None is that of training. over: a model whose
    score of the same seed is subtracted."""

    metric: str
    model: str
    source: str
    at_least: float | None = None
    at_most: float | None = None
    over: str | None = None
    length: int | None = None
    scale: int | None = None  # the same in lengths of training
    claim: str | None = None  # in words

    @property
    def split(self) -> str:
        return self.metric.partition("/")[0]

    @property
    def name(self) -> str:
        return self.metric.partition("/")[2]

    def input_length(self, seq_len: int) -> int:
        return self.length if self.length is not None else seq_len * (self.scale or 1)

    def __str__(self) -> str:
        who = f"{self.model} - {self.over}" if self.over else self.model
        where = "" if self.length is None and self.scale is None else f" at {f'length {self.length}' if self.length else f'{self.scale}x'}"
        return f"{who}: {self.metric}{where}{self.bounds}"

    @property
    def bounds(self) -> str:
        low = "" if self.at_least is None else f" >= {number(self.at_least)}"
        return low + ("" if self.at_most is None else f"{' and' if low else ''} <= {number(self.at_most)}")


class Verdict(NamedTuple):
    verdict: Literal["held", "not held", "cannot tell"]
    found: Estimate | None
    why: str | None  # it cannot be told


TYPES: dict[str, tuple[type, ...]] = {
    "claim": (str,), "metric": (str,), "length": (int,), "scale": (int,), "model": (str,), "over": (str,), "at_least": (int, float),
    "at_most": (int, float), "source": (str,),
}  # fmt: skip
WORDS: dict[tuple[type, ...], str] = {(str,): "a text", (int,): "a whole number", (int, float): "a number"}


def parse(tree: Any, models: Sequence[str]) -> list[Expectation]:
    """The list `expect` of a file; MistakeError for the first mistake that can be seen without the task."""
    if not isinstance(tree, list):
        raise MistakeError(("expect",), "expected a list of expectations, each with metric, model, a bound and source")
    return [_parse_one(("expect", index), item, models) for index, item in enumerate(tree)]


def _parse_one(key: Key, item: Any, models: Sequence[str]) -> Expectation:
    if not isinstance(item, dict):
        raise MistakeError(key, f"expected keys and values ({', '.join(TYPES)}), got {item!r}")
    for name, value in item.items():
        if name not in TYPES:
            raise MistakeError((*key, name), f"there is no such key{hint(str(name), TYPES)}")
        if not isinstance(value, TYPES[name]) or isinstance(value, bool):
            raise MistakeError((*key, name), f"expected {WORDS[TYPES[name]]}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise MistakeError((*key, name), f"expected a finite number, got {value}; leave out a bound that there is not")
    for name in ("metric", "model", "source"):
        if name not in item:
            raise MistakeError((*key, name), "it is missing; an expectation has metric, model, a bound and source", culprit=key)
    if "at_least" not in item and "at_most" not in item:
        raise MistakeError(key, "it has no bound; at_least or at_most gives one")
    if item.get("at_least", float("-inf")) > item.get("at_most", float("inf")):
        raise MistakeError((*key, "at_least"), f"it is above at_most, {item['at_most']}")
    if "length" in item and "scale" in item:
        raise MistakeError((*key, "scale"), "length says it already; keep one of them")
    for name in ("length", "scale"):
        if item.get(name, 1) < 1:
            raise MistakeError((*key, name), f"it must be at least 1, got {item[name]}")
    for name in ("model", "over"):
        if name in item and item[name] not in models:
            raise MistakeError((*key, name), f"there is no model {item[name]} in models{hint(item[name], models, 'there are')}")
    if item.get("over") == item["model"]:
        raise MistakeError((*key, "over"), f"it is the model itself, {item['over']}")
    split, _, name = item["metric"].partition("/")
    if split not in SPLITS or not name:
        near = nearest(split, SPLITS) if name else "test"
        raise MistakeError((*key, "metric"), f"{item['metric']} names no split; did you mean {near or 'test'}/{name or split}?")
    if split == "val" and ("length" in item or item.get("scale", 1) != 1):
        raise MistakeError((*key, "metric"), f"validation is at the length of training alone; other lengths have test/{name}")
    return Expectation(**item)


def judge(expectation: Expectation, scores: Mapping[str, Mapping[int, float]], missing: Mapping[str, Mapping[int, str]]) -> Verdict:
    """scores: {model: {seed: score}} of the runs that have it. missing: {model: {seed: why it has none}} of the others: while there are
    any, nothing can be told, for those that fail may be those that do badly."""
    mine = scores.get(expectation.model, {})
    if expectation.over is not None:
        theirs = scores.get(expectation.over, {})
        values = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
        found = paired_interval(values) if values else None
    else:
        found = estimate(list(mine.values())) if mine else None
    names = [name for name in (expectation.model, expectation.over) if name and missing.get(name)]
    if names:
        return Verdict("cannot tell", found, "; ".join(lacking(name, missing[name], bool(scores.get(name))) for name in names))
    assert found is not None
    if found.low is None or found.high is None:
        return Verdict("cannot tell", found, "one seed gives no interval")
    low = float("-inf") if expectation.at_least is None else expectation.at_least
    high = float("inf") if expectation.at_most is None else expectation.at_most
    if low <= found.low and found.high <= high:
        return Verdict("held", found, None)
    if found.high < low or high < found.low:
        return Verdict("not held", found, None)
    return Verdict("cannot tell", found, "the interval is on both sides of the bound")


def lacking(model: str, missing: Mapping[int, str], others: bool) -> str:
    """others: whether some seeds of the model have the score."""
    seeds: dict[str, list[str]] = {}
    for seed, why in missing.items():
        seeds.setdefault(why, []).append(str(seed))
    if len(seeds) == 1 and not others:
        return f"{model}: {next(iter(seeds))}"
    return f"{model}: " + "; ".join(f"seed{'s' * (len(those) > 1)} {', '.join(those)}: {why}" for why, those in seeds.items())
