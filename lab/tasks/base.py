"""What every task is: a `Task` that yields a `Split` for train, val and test, whose samples come in a `Batch`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Indices: TypeAlias = "Sequence[int] | np.ndarray"
IGNORE = -100  # a target that is not scored
SPLITS = ("train", "val", "test")


class Batch(NamedTuple):
    """Right-padded rows. inputs (B, L) int64; targets (B, L) int64 with -100 where nothing is scored, or, of classes, (B,) or
    (B, n_answers)."""

    inputs: Tensor
    targets: Tensor
    lengths: Tensor | None = None  # (B,) real tokens of each row; None: all L
    source: Tensor | None = None  # (B, S), only for encoder-decoder models
    source_lengths: Tensor | None = None
    by: dict[str, Tensor] | None = None  # what accuracy is reported by, beside the position: "distance", "pairs"; (B, L), 0 .. L each

    def to(self, device: torch.device | str) -> Batch:
        def moved(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        return Batch(*(pytree.tree_map_only(Tensor, moved, field) for field in self))


def with_source(batch: Batch, prompt_len: int, start_token: int) -> Batch:
    """Rows of a prompt and an answer, for an encoder-decoder: the prompt as the source, the answer behind a start token.

    inputs    5 9 3 | 3 9                  source   5 9 3 |
    targets   . . . 3 9 5                  inputs   S 3 9         targets   3 9 5
    """
    if batch.lengths is not None:
        raise ValueError("with_source: the rows must have one length")
    targets = batch.targets[:, prompt_len - 1 :]
    start = torch.full((len(targets), 1), start_token, dtype=batch.inputs.dtype)
    inputs = torch.cat([start, batch.inputs[:, prompt_len:]], 1)
    return Batch(inputs, targets.contiguous(), source=batch.inputs[:, :prompt_len].contiguous())


class Split(ABC):
    """One split. Sample i is a pure function of (task seed, split, i): no order of workers, batches or resumes can change it."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Indices) -> Batch: ...

    def facts(self) -> Mapping[str, Any]:
        """What metrics.json should say about how this split is scored, as {"context": 256, "stride": 128}."""
        return {}


class Task(ABC):
    """The base of all tasks. `vocab_size` and `seq_len` (the longest training input) are what a model is built for, and `n_classes`."""

    vocab_size: int
    seq_len: int
    n_classes: int | None = None  # of a whole input; None: the task is to predict tokens
    n_answers: int = 1  # with n_classes, how many a whole input has: targets (B,), or (B, n_answers)
    next_token: bool = True  # whether targets are the tokens to come, which a model that reads the future would copy
    prompt_len: int | None = None  # tokens given before free-running decoding at scale 1; None: the task has no such score
    start_token: int | None = None  # where the prompt is the source of an encoder-decoder: what an answer begins with; None: no source
    free_samples: int = 0  # rows that validation decodes freely; lab-eval decodes all
    eval_lengths: Sequence[int] = (1,)  # multiples of seq_len that lab-eval reports
    metrics: Sequence[str] = ("token_accuracy", "exact_match")  # of lab.analysis.metrics.SCORES, those that mean something here
    by: Sequence[str] = ()  # the names in Batch.by of each batch
    reference: Mapping[str, Any] = {}  # published scores: {name: {value, source}}, in units of `metrics[0]`
    text: bool = False  # whether tokens stand for text, which encode and decode translate
    encoding: str | None = None  # of text: what a token is, for programs without lab, as "bytes of UTF-8"
    stop_token: int | None = None  # where a text ends
    carry_state: bool = False  # training reads contiguous streams, and each window continues the state of the one before it

    @abstractmethod
    def split(self, name: str, scale: int = 1) -> Split:
        """The split `train`, `val` or `test`; `scale` gives inputs of scale * seq_len, where the task can make them."""

    def validation(self) -> Split:
        """What validation during training scores: the split `val`, or a part of it where all of it would take too long."""
        return self.split("val")

    def facts(self) -> Mapping[str, Any]:
        """What identifies the data, where the config does not: stored in checkpoints and metrics.json. Another "sha256" than that of
        training is an error in lab-eval and on resume."""
        return {}

    @property
    def token_bytes(self) -> np.ndarray | None:
        """(V,) bytes of text that each token stands for; None: one each. What bits per byte are counted by."""
        return None

    def stored(self) -> dict[str, Any]:
        """What a checkpoint keeps of the task beside its config, in plain values: what was learned of the data, such as a tokenizer."""
        return {}

    def restore(self, stored: Mapping[str, Any]) -> None:  # noqa: B027
        """The task goes by what a checkpoint has kept, in place of what it would make of the data that are here."""

    def references(self, split: str) -> Mapping[str, float]:
        """Scores on a whole split that need no model, by name, in units of `metrics[0]`."""
        return {}

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; only where `text` is true."""
        raise NotImplementedError(f"{type(self).__name__} has no text: its tokens stand for themselves")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what they do not spell out, such as a part of a character, becomes U+FFFD."""
        raise NotImplementedError(f"{type(self).__name__} has no text: its tokens stand for themselves")

    def describe(self) -> str:
        """One line about the data, printed before training."""
        return f"{type(self).__name__}: {len(self.split('train')):,} training samples of length {self.seq_len}"


def check_reference(reference: Mapping[str, Any] | None) -> dict[str, Any]:
    """The published scores of a task's YAML, {name: {value, source}}; ValueError for anything else."""
    for name, entry in (reference or {}).items():
        right = isinstance(entry, Mapping) and set(entry) == {"value", "source"}
        if not right or not isinstance(entry["value"], int | float) or not isinstance(entry["source"], str):
            raise ValueError(f"task.reference: {name} must be {{value: a number, source: a text}}, got {entry}")
    return dict(reference or {})


def random_integers(seed: int, stream: str, indices: np.ndarray, n: int, low: int, high: int) -> np.ndarray:
    """n integers in [low, high) for each index, a pure function of (seed, stream, index): splitmix64 of a counter.

    indices (B,) int64 -> (B, n) int64. Counter-based, so that a batch of any rows costs one vectorised expression and row i
    never depends on which other rows were asked for. The bias of the modulus is below (high - low) / 2^64.
    """
    key = np.random.SeedSequence([seed, *stream.encode()]).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2^64
        counter = indices.astype(np.uint64)[:, None] * np.uint64(n) + np.arange(n, dtype=np.uint64)
        return (_mix(_mix(counter ^ key) + key) % np.uint64(high - low)).astype(np.int64) + low


def _mix(z: np.ndarray) -> np.ndarray:
    """The splitmix64 generator's output function (Steele, Lea and Flood, OOPSLA 2014)."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_uniform(seed: int, stream: str, indices: np.ndarray, n: int) -> np.ndarray:
    """n numbers in (0, 1) for each index, as `random_integers`: (B,) -> (B, n) float64."""
    return (random_integers(seed, stream, indices, n, 0, 2**52) + 0.5) / 2**52


def distinct_integers(seed: int, stream: str, indices: np.ndarray, n: int, low: int, high: int) -> np.ndarray:
    """n different integers in [low, high) for each index, each ordered choice equally likely: (B,) -> (B, n).

    The first n steps of a Fisher-Yates shuffle of low .. high - 1, of which only the places that were swapped are kept: slot j gets what
    stands at place t_j >= j, and t_j what stood at slot j. The cost depends on n alone.
    """
    size = high - low
    target = random_integers(seed, stream, indices, n, 0, 2**62) % (size - np.arange(n)) + np.arange(n)  # t, (B, n)
    moved = np.empty_like(target)  # what step j put at place t_j

    def at(place: np.ndarray, j: int) -> np.ndarray:
        """What stands at a place (B,) before step j: the last that was moved there, or its own number."""
        hits = target[:, :j] == place[:, None]
        last = j - 1 - hits[:, ::-1].argmax(1) if j else place
        return np.where(hits.any(1), moved[np.arange(len(place)), last], place) if j else place

    chosen = np.empty_like(target)
    for j in range(n):
        chosen[:, j] = at(target[:, j], j)
        moved[:, j] = at(np.full(len(target), j), j)
    return chosen + low
