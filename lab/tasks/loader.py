"""Loaders. What optimiser step t trains on is a pure function of (seed, t): nothing else decides it, so a resume is exact.

Streams (task.carry_state): the split is cut into as many equal streams as a window has rows, and row i of step t continues where row i of
step t - 1 ended, so that a model's state can be carried from step to step. An epoch is one way through all streams; which stream a row
reads, and where in it the first window begins, is drawn anew for each epoch. At the first step of an epoch no row continues anything.

A step's data is a *window*: the `accumulate` micro-batches whose gradients one optimiser step adds up. The loader hands out
whole windows; a step is therefore an optimiser step everywhere, and no checkpoint can fall inside an accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.data

from lab.tasks.base import Batch, Split
from lab.tasks.windows import Windows


class TrainLoader:
    """Windows 0 .. max_steps - 1 of a split, shuffled anew in every epoch; the last, incomplete window of an epoch is dropped. streams: of
    contiguous streams instead, of a split of `Windows`.

    batch_size counts sequences over all ranks; each rank gets its contiguous share of every micro-batch. Lightning stores
    `state_dict` in the checkpoint and gives it back before it iterates. Raises ValueError where the sizes do not fit.
    """

    def __init__(
        self, split: Split, batch_size: int, accumulate: int, max_steps: int, seed: int, rank: int = 0, world: int = 1,
        num_workers: int = 0, pin_memory: bool = False, streams: bool = False,
    ) -> None:  # fmt: skip
        if batch_size % world:
            raise ValueError(
                f"trainer.batch_size is {batch_size}, which the {world} devices do not divide: it counts sequences over all devices"
            )
        self.windows = (_Streams if streams else _Shuffled)(split, batch_size, accumulate, seed, rank, world)
        self.max_steps, self.num_workers, self.pin_memory = max_steps, num_workers, pin_memory
        self.step = 0

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[list[Batch]]:
        for window in _loader(self.windows, range(self.step, self.max_steps), self.num_workers, self.pin_memory):
            self.step += 1
            yield window

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class EvalLoader:
    """Every sample of a split once, in order, in batches of at most batch_size // world; ranks take turns."""

    def __init__(
        self, split: Split, batch_size: int, rank: int = 0, world: int = 1, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        size = max(batch_size // world, 1)
        self.batches = [range(i, min(i + size, len(split))) for i in range(rank * size, len(split), size * world)]
        self.data = _Batches(split)
        self.num_workers, self.pin_memory = num_workers, pin_memory

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(_loader(self.data, self.batches, self.num_workers, self.pin_memory))


class _Windows(torch.utils.data.Dataset):
    """Item t: the micro-batches of optimiser step t, for one rank."""

    streams = False

    def __init__(self, split: Split, batch_size: int, accumulate: int, seed: int, rank: int, world: int) -> None:
        self.split, self.seed, self.accumulate = split, seed, accumulate
        self.rows = batch_size * accumulate
        share = batch_size // world
        self.share = slice(rank * share, (rank + 1) * share)
        self.steps_per_epoch = steps_per_epoch(split, batch_size, accumulate, self.streams)
        self.epoch = -1


class _Shuffled(_Windows):
    def __init__(self, split: Split, batch_size: int, accumulate: int, seed: int, rank: int, world: int) -> None:
        super().__init__(split, batch_size, accumulate, seed, rank, world)
        self.order = np.empty(0, dtype=np.int64)

    def __getitem__(self, step: int) -> list[Batch]:
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:  # kept for the steps that follow; the result is the same without
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.split))
        rows = self.order[position * self.rows : (position + 1) * self.rows].reshape(self.accumulate, -1)
        return [self.split.batch(micro[self.share]) for micro in rows]


class _Streams(_Windows):
    split: Windows
    streams = True

    def __getitem__(self, step: int) -> list[Batch]:
        epoch, position = divmod(step, self.steps_per_epoch)
        length, context = self.split.n // self.rows, self.split.context
        if epoch != self.epoch:
            random = np.random.default_rng([self.seed, epoch])
            offset = random.integers(length - self.steps_per_epoch * context + 1)
            self.epoch, self.begin = epoch, random.permutation(self.rows) * length + offset
        rows = (self.begin + position * context).reshape(self.accumulate, -1)
        return [self.split.at(micro[self.share]) for micro in rows]


class _Batches(torch.utils.data.Dataset):
    """Item: the batch of a range of indices."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitem__(self, indices: range) -> Batch:
        return self.split.batch(indices)


def steps_per_epoch(split: Split, batch_size: int, accumulate: int, streams: bool = False) -> int:
    """Whole windows in an epoch; ValueError if there is none."""
    rows = batch_size * accumulate
    steps = split.n // rows // split.context if streams and isinstance(split, Windows) else len(split) // rows
    if not steps:
        size = f"{len(split)} samples" + (", which are cut into streams" if streams else "")
        raise ValueError(f"the training split has {size}, one step needs trainer.batch_size {batch_size} x trainer.accumulate {accumulate}")
    return steps


def _loader(data: Any, sampler: Any, num_workers: int, pin_memory: bool) -> Any:
    # A generator of its own: creating an iterator otherwise draws from the global one, and a resumed run would see other dropout masks.
    return torch.utils.data.DataLoader(
        data, sampler=sampler, batch_size=None, num_workers=num_workers, pin_memory=pin_memory, generator=torch.Generator()
    )
