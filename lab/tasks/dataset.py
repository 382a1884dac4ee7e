"""A data set of the user's own: any map-style `torch.utils.data.Dataset` whose items are (input_ids, target_ids).

    item 0    input_ids  5 6 7 8      target_ids  6 7 8 9
    item 1    input_ids  5 6          target_ids  6 7
    batch     inputs     5 6 7 8      targets     6 7 8 9        lengths  4
                         5 6 0 0                  6 7 . .                 2

Items are 1-D integer tensors, arrays or lists of equal length, -100 where a target is not scored; rows are padded on the right.
An item must depend on its index alone, or a resumed run would not be the same run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from lab.config import ConfigError
from lab.tasks.base import IGNORE, SPLITS, Batch, Indices, Split, Task


class Dataset(Task):
    """Nodes `train`, `val` and (optional) `test` name the data sets; vocab_size and seq_len are verified against what they yield."""

    next_token = False  # the targets are the user's own: labels of the tokens may be read off the whole sequence

    def __init__(self, vocab_size: int, seq_len: int, train: Any, val: Any, test: Any | None = None, pad_token: int = 0) -> None:
        self.vocab_size, self.seq_len, self.pad_token = vocab_size, seq_len, pad_token
        self.data = dict(zip(SPLITS, (train, val, test), strict=True))
        for name, data in self.data.items():
            if data is None and name == "test":
                continue
            if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
                raise ValueError(f"task.{name} must be a data set with __getitem__ and __len__, got {type(data).__name__}")
            if not len(data):
                raise ValueError(f"task.{name} is an empty data set")
            self.split(name).batch([0])

    def split(self, name: str, scale: int = 1) -> DatasetSplit:
        if scale != 1:
            raise ConfigError("task=dataset has no samples at other lengths: leave task.eval_lengths at [1]")
        if self.data[name] is None:
            raise ConfigError(f"task.{name} is not set: the run has no {name} split; lab-eval takes split=val")
        return DatasetSplit(self, name)


class DatasetSplit(Split):
    def __init__(self, task: Dataset, name: str) -> None:
        self.task, self.name, self.data = task, name, task.data[name]

    def __len__(self) -> int:
        return len(self.data)

    def item(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Item `index` as int64 tensors; raises ConfigError where it is not what the task node says."""
        where = f"task.{self.name}[{index}]"
        try:
            inputs, targets = (torch.as_tensor(part).long() for part in self.data[index])
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where} must be a pair (input_ids, target_ids) of integers: {error}") from error
        if inputs.ndim != 1 or inputs.shape != targets.shape:
            raise ConfigError(
                f"{where} must be two 1-D sequences of equal length, got shapes {tuple(inputs.shape)} and {tuple(targets.shape)}"
            )
        if not 0 < len(inputs) <= self.task.seq_len:
            raise ConfigError(f"{where} has {len(inputs)} tokens; task.seq_len allows 1 to {self.task.seq_len}")
        scored = targets[targets != IGNORE]
        for name, tokens in (("input_ids", inputs), ("target_ids", scored)):
            low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
            if not 0 <= low <= high < self.task.vocab_size:
                raise ConfigError(f"{where} has {name} from {low} to {high}; task.vocab_size allows 0 to {self.task.vocab_size - 1}")
        return inputs, targets

    def batch(self, indices: Indices) -> Batch:
        inputs, targets = zip(*(self.item(int(i)) for i in indices), strict=True)
        lengths = torch.tensor([len(row) for row in inputs])
        return Batch(
            inputs=pad_sequence(list(inputs), batch_first=True, padding_value=self.task.pad_token),
            targets=pad_sequence(list(targets), batch_first=True, padding_value=IGNORE),
            lengths=None if bool((lengths == lengths[0]).all()) else lengths,
        )
