"""Scores of token predictions, as torchmetrics: they accumulate over batches and over ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from lab.models import SequenceModel
from lab.tasks import Batch, Task
from lab.tasks.base import IGNORE

SCORES = {
    "token_accuracy": "scored tokens that are right",
    "exact_match": "rows with every scored token right",
    "bits_per_byte": "ce_loss / ln 2, where a token is a byte",
}
"""What `Task.metrics` may name, beside ce_loss, which every task has."""


def score_names(task: Task) -> list[str]:
    """What every model is scored by on a task; a model may add its own."""
    return ["ce_loss", *task.metrics, *(["exact_match_free"] if task.prompt_len is not None else [])]


class TokenScores(Metric):
    """ce_loss (nats per scored token), those of SCORES that are asked for, and accuracy by position.

    Teacher-forced: logits (B, L, V) against targets (B, L), -100 where nothing is scored.
    """

    full_state_update = False

    def __init__(self, length: int, names: Sequence[str] = Task.metrics) -> None:
        super().__init__()
        unknown = sorted(set(names) - set(SCORES))
        if unknown:
            raise ValueError(f"the metrics of a task can be {', '.join(SCORES)}; got {', '.join(unknown)}")
        self.names = tuple(names)
        zero = torch.zeros((), dtype=torch.float64)
        for name in ("ce", "rows", "exact"):
            self.add_state(name, zero.clone(), dist_reduce_fx="sum")
        for name in ("correct", "scored"):
            self.add_state(name, torch.zeros(length, dtype=torch.float64), dist_reduce_fx="sum")
        self.ce: Tensor
        self.rows: Tensor
        self.exact: Tensor
        self.correct: Tensor
        self.scored: Tensor

    def update(self, logits: Tensor, targets: Tensor) -> None:
        scored = targets != IGNORE
        correct = (logits.argmax(-1) == targets) & scored
        self.ce += cross_entropy(logits, targets).double().sum()
        self.rows += len(targets)
        self.exact += (correct == scored).all(1).sum()
        length = targets.shape[1]
        self.correct[:length] += correct.sum(0)
        self.scored[:length] += scored.sum(0)

    def compute(self) -> dict[str, Tensor]:
        ce_loss = self.ce / self.scored.sum()
        scores = {
            "token_accuracy": self.correct.sum() / self.scored.sum(),
            "exact_match": self.exact / self.rows,
            "bits_per_byte": ce_loss / math.log(2),
        }
        by_position = self.correct / self.scored  # (L,), NaN where nothing was scored
        return {"ce_loss": ce_loss} | {name: scores[name] for name in self.names} | {"by_position": by_position}


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
        self.tokens = TokenScores(task.seq_len * scale, task.metrics)
        self.losses: Mapping[str, MeanMetric] = nn.ModuleDict({name: MeanMetric() for name in model.loss_names})  # type: ignore[assignment]
        self.means = TokenMeans(model.mean_shapes)
        self.free = MeanMetric()
        self.prompt_len = None if task.prompt_len is None else (task.prompt_len - 1) * scale + 1
        self.free_samples = free_samples if self.prompt_len is not None else 0
        self.free_left = self.free_samples

    @torch.no_grad()
    def update(self, model: SequenceModel, batch: Batch) -> None:
        out = model(batch.inputs, lengths=batch.lengths, want=("losses",))
        self.tokens.update(out.y, batch.targets)
        weight = batch.inputs.numel() if batch.lengths is None else int(batch.lengths.sum())
        for name, metric in self.losses.items():
            metric.update(out.losses[name], weight)
        if model.mean_shapes:
            self.means.update(out.means, weight)
        if self.free_left > 0:
            matches = free_running_matches(model, batch, self.prompt_len or 1)[: self.free_left]
            self.free.update(matches.float())
            self.free_left -= len(matches)

    def compute(self, model: SequenceModel) -> tuple[dict[str, float], list[float | None]]:
        """(metrics by name, accuracy by position with None where nothing is scored), over all ranks."""
        metrics = self.tokens.compute()
        # reshape: torchmetrics turns a tensor of one element into a scalar
        by_position = [None if value != value else value for value in metrics.pop("by_position").reshape(-1).tolist()]
        losses = {name: metric.compute() for name, metric in self.losses.items()}
        if model.mean_shapes:  # not the mean of the batches' losses, which would depend on their size
            losses |= model.losses_of(self.means.compute())
        metrics |= losses | {f"mean_{name}": value for name, value in model.derived_metrics(losses).items()}
        if self.free_samples:
            metrics["exact_match_free"] = self.free.compute()
        return {name: float(value) for name, value in metrics.items()}, by_position

    def reset(self, world: int = 1) -> None:
        """Forgets all batches; this rank then decodes its share of the free samples."""
        for metric in (self.tokens, self.means, self.free, *self.losses.values()):
            metric.reset()
        self.free_left = -(-self.free_samples // world)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of each token in float32, 0 where it is not scored. logits (B, L, V), targets (B, L) -> (B * L,)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none")


def free_running_matches(model: SequenceModel, batch: Batch, prompt_len: int) -> Tensor:
    """(B,) bool: does greedy decoding from the first prompt_len tokens, fed its own output, give every scored target?"""
    targets = batch.targets[:, prompt_len - 1 :]
    prompt = batch.inputs[:, :prompt_len]
    with torch.compiler.set_stance("force_eager"):  # a growing cache would compile a graph per length
        decoded = model.generate(prompt, max_new_tokens=targets.shape[1])[:, prompt_len:]
    return ((decoded == targets) | (targets == IGNORE)).all(1)
