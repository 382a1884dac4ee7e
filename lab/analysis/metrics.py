"""Scores of predicted tokens and classes, as torchmetrics: they accumulate over batches and over ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from lab.mixers import Output, State
from lab.models import SequenceModel
from lab.tasks import Batch, Task
from lab.tasks.base import IGNORE

SCORES = {
    "accuracy": "inputs whose class is right",
    "token_accuracy": "scored tokens that are right",
    "exact_match": "rows with every scored token right",
    "bits_per_byte": "all nats / ln 2, divided by the bytes of text that the scored tokens stand for",
    "perplexity": "exp(ce_loss), per token",
}
"""What `Task.metrics` may name, beside ce_loss, which every task has."""
MOST_CLASSES = 100


def run(model: SequenceModel, batch: Batch, state: State = None, *, want: tuple[str, ...]) -> Output:
    """The one call of a model on a batch: training, evaluation and monitoring go through it. state: of the batch before, where one is
    carried."""
    out: Output = model(
        batch.inputs, state, lengths=batch.lengths, source=batch.source, source_lengths=batch.source_lengths, want=want
    )  # fmt: skip
    return out


def score_names(task: Task, model: SequenceModel | None = None) -> list[str]:
    """What every model is scored by on a task, and what this one adds."""
    names = ["ce_loss", *task.metrics, *(["exact_match_free"] if task.prompt_len is not None else [])]
    if model is None:
        return names
    derived = model.derived_metrics({name: torch.zeros(()) for name in model.loss_names})
    return [*names, *model.loss_names, *(f"mean_{name}" for name in derived)]


class TokenScores(Metric):
    """ce_loss (nats per scored token), those of SCORES that are asked for, and accuracy by position and by what else a batch says of its
    tokens; of classes, how often each was taken for which.

    Teacher-forced: logits (B, L, V) against targets (B, L), -100 where nothing is scored; or, of classes, (B, C) against (B,). by: the
    names of a batch's `by`. n_classes: up to MOST_CLASSES are counted by what they were taken for. token_bytes (V,): of `Task`.
    """

    full_state_update = False

    def __init__(
        self,
        length: int,
        names: Sequence[str] = Task.metrics,
        by: Sequence[str] = (),
        n_classes: int | None = None,
        token_bytes: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        unknown = sorted(set(names) - set(SCORES))
        if unknown:
            raise ValueError(f"the metrics of a task can be {', '.join(SCORES)}; got {', '.join(unknown)}")
        self.names, self.by = tuple(names), tuple(by)
        self.confused = n_classes is not None and n_classes <= MOST_CLASSES
        self.classes = n_classes is not None
        length = 1 if self.classes else length
        zero = torch.zeros((), dtype=torch.float64)
        self.register_buffer("token_bytes", None if token_bytes is None else torch.from_numpy(token_bytes), persistent=False)
        for name in ("ce", "rows", "exact", "bytes"):
            self.add_state(name, zero.clone(), dist_reduce_fx="sum")
        for name in ("correct", "scored"):
            self.add_state(name, torch.zeros(length, dtype=torch.float64), dist_reduce_fx="sum")
        for name in self.by:
            for kind in ("correct", "scored"):
                self.add_state(f"{kind}_{name}", torch.zeros(length + 1, dtype=torch.float64), dist_reduce_fx="sum")
        if self.confused:
            self.add_state("taken", torch.zeros(n_classes, n_classes, dtype=torch.float64), dist_reduce_fx="sum")  # type: ignore[arg-type]
        self.ce: Tensor
        self.taken: Tensor
        self.rows: Tensor
        self.exact: Tensor
        self.bytes: Tensor
        self.token_bytes: Tensor | None
        self.correct: Tensor
        self.scored: Tensor

    def update(self, logits: Tensor, targets: Tensor, by: Mapping[str, Tensor] | None = None) -> None:
        if self.confused:
            self.taken.index_put_((targets, logits.argmax(-1)), self.taken.new_ones(()), accumulate=True)
        if targets.ndim == 1:
            logits, targets = logits[:, None], targets[:, None]
        scored = targets != IGNORE
        correct = (logits.argmax(-1) == targets) & scored
        self.ce += cross_entropy(logits, targets).double().sum()
        self.rows += len(targets)
        self.exact += (correct == scored).all(1).sum()
        self.bytes += bytes_of(targets, self.token_bytes)
        length = targets.shape[1]
        self.correct[:length] += correct.sum(0)
        self.scored[:length] += scored.sum(0)
        for name in self.by:
            value = by[name] if by is not None else torch.zeros_like(targets)
            for kind, which in (("correct", correct), ("scored", scored)):
                counts = getattr(self, f"{kind}_{name}")
                counts += torch.bincount(value[which], minlength=len(counts)).to(counts)

    def compute(self) -> dict[str, Tensor]:
        ce_loss = self.ce / self.scored.sum()
        scores = {
            "accuracy": self.correct.sum() / self.scored.sum(),
            "token_accuracy": self.correct.sum() / self.scored.sum(),
            "exact_match": self.exact / self.rows,
            "bits_per_byte": self.ce / self.bytes / math.log(2),
            "perplexity": ce_loss.exp(),
        }
        tables = {"by_position": self.correct / self.scored}  # (L,), NaN where nothing was scored
        tables |= {f"by_{name}": torch.stack([getattr(self, f"{kind}_{name}") for kind in ("correct", "scored")]) for name in self.by}
        if self.confused:
            tables["confusion"] = self.taken.clone()  # (C, C)
        return {"ce_loss": ce_loss} | {name: scores[name] for name in self.names} | tables


class TokenMeans(Metric):
    """Means over real tokens, of the names and shapes of a model's `mean_shapes`: over all batches and ranks."""

    full_state_update = False

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.names = tuple(shapes)
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name, shape in shapes.items():
            self.add_state(f"sum_{name}", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.tokens: Tensor

    def update(self, means: Mapping[str, Tensor], tokens: int) -> None:
        self.tokens += tokens
        for name in self.names:
            setattr(self, f"sum_{name}", getattr(self, f"sum_{name}") + tokens * means[name].double())

    def compute(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"sum_{name}") / self.tokens for name in self.names}


class Evaluation(nn.Module):
    """Everything that a model is scored by on one split of a task: the same object serves validation and lab-eval.

    `update` takes a batch; free-running decoding is done on the first `free_samples` rows it sees (on this rank).
    """

    def __init__(self, task: Task, model: SequenceModel, free_samples: int, scale: int = 1) -> None:
        super().__init__()
        token_bytes = task.token_bytes if "bits_per_byte" in task.metrics else None
        n_classes = task.n_classes if task.n_answers == 1 else None
        self.tokens = TokenScores(task.seq_len * scale, task.metrics, task.by, n_classes, token_bytes)
        self.losses: Mapping[str, MeanMetric] = nn.ModuleDict({name: MeanMetric() for name in model.loss_names})  # type: ignore[assignment]
        self.means = TokenMeans(model.mean_shapes)
        self.free = MeanMetric()
        self.prompt_len = None if task.prompt_len is None else (task.prompt_len - 1) * scale + 1
        self.free_samples = free_samples if self.prompt_len is not None else 0
        self.free_left = self.free_samples

    @torch.no_grad()
    def update(self, model: SequenceModel, batch: Batch) -> None:
        out = run(model, batch, want=("losses",))
        self.tokens.update(out.y, batch.targets, batch.by)
        weight = batch.inputs.numel() if batch.lengths is None else int(batch.lengths.sum())
        for name, metric in self.losses.items():
            metric.update(out.losses[name], weight)
        if model.mean_shapes:
            self.means.update(out.means, weight)
        if self.free_left > 0:
            matches = free_running_matches(model, batch, self.prompt_len or 1)[: self.free_left]
            self.free.update(matches.float())
            self.free_left -= len(matches)

    def compute(self, model: SequenceModel) -> tuple[dict[str, float], dict[str, Any]]:
        """(metrics by name, tables by name), over all ranks. by_position: a list, None where nothing is scored; not of classes.
        by_distance: by ranges that double; by_pairs: by their number. confusion: rows are the true classes."""
        metrics = self.tokens.compute()
        # reshape: torchmetrics turns a tensor of one element into a scalar
        by_position = [None if value != value else value for value in metrics.pop("by_position").reshape(-1).tolist()]
        while by_position and by_position[-1] is None:  # an answer alone is shorter than task.seq_len
            by_position.pop()
        tables: dict[str, Any] = {"by_position": [] if self.tokens.classes else by_position}
        for name in self.tokens.by:
            correct, scored = metrics.pop(f"by_{name}").tolist()
            tables[f"by_{name}"] = by_value(correct, scored, ranges=name == "distance")
        if self.tokens.confused:
            tables["confusion"] = metrics.pop("confusion").long().tolist()
        losses = {name: metric.compute() for name, metric in self.losses.items()}
        if model.mean_shapes:  # not the mean of the batches' losses, which would depend on their size
            losses |= model.losses_of(self.means.compute())
        metrics |= losses | {f"mean_{name}": value for name, value in model.derived_metrics(losses).items()}
        if self.free_samples:
            metrics["exact_match_free"] = self.free.compute()
        return {name: float(value) for name, value in metrics.items()}, tables

    def reset(self, world: int = 1) -> None:
        """Forgets all batches; this rank then decodes its share of the free samples."""
        for metric in (self.tokens, self.means, self.free, *self.losses.values()):
            metric.reset()
        self.free_left = -(-self.free_samples // world)


def by_value(correct: Sequence[float], scored: Sequence[float], ranges: bool) -> dict[str, float]:
    """Accuracy by a number, {"4": 0.5}, or by ranges of it that double, {"4-7": 0.5}, from the counts at 0, 1, 2, ...; without those that
    nothing was scored at."""
    edges = [0, *(1 << i for i in range(len(scored).bit_length() + 1))] if ranges else range(len(scored) + 1)
    found = {}
    for first, end in pairwise(edges):
        if total := sum(scored[first:end]):
            found[str(first) if end - first == 1 else f"{first}-{end - 1}"] = sum(correct[first:end]) / total
    return found


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in float32, 0 where it is not scored. logits (B, L, V), targets (B, L) -> (B * L,); (B, C), (B,) -> (B,)"""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction="none")


def bytes_of(targets: Tensor, token_bytes: Tensor | None) -> Tensor:
    """() bytes of text that the scored targets (B, L) stand for; token_bytes (V,), None: one each."""
    scored = targets != IGNORE
    return scored.sum() if token_bytes is None else token_bytes[targets[scored]].sum()


def free_running_matches(model: SequenceModel, batch: Batch, prompt_len: int) -> Tensor:
    """(B,) bool: does greedy decoding from the first prompt_len tokens, fed its own output, give every scored target?"""
    targets = batch.targets[:, prompt_len - 1 :]
    prompt = batch.inputs[:, :prompt_len]
    with torch.compiler.set_stance("force_eager"):  # a growing cache would compile a graph per length
        whole = model.generate(prompt, targets.shape[1], source=batch.source, source_lengths=batch.source_lengths)
    decoded = whole[:, prompt_len:]
    return ((decoded == targets) | (targets == IGNORE)).all(1)
