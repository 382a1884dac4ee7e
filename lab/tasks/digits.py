"""Digits: 1,797 handwritten digits of 8 x 8 pixels, read pixel by pixel, and classified. Real data without a download.

    inputs    0 0 5 13 9 1 0 0  0 0 13 15 10 15 5 0  ...   64 pixels, row by row, of 17 levels of grey
    target    0                                            the digit

The images come with scikit-learn (its `load_digits`; the test set of "Optical Recognition of Handwritten Digits", UCI, E. Alpaydin and
C. Kaynak, 1998). An image is in one split alone, by a fixed shuffle of all: 1,297 train, 250 val, 250 test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

from lab.config import ConfigError
from lab.tasks.base import SPLITS, Batch, Indices, Split, Task, check_reference
from lab.tasks.synthetic import constant_answers, duplicates

HELD_OUT = 250  # images of val, and of test
ORDER = 20260101  # the seed of the shuffle that splits; it is no option, so that all runs have the same test images


class Digits(Task):
    next_token = False
    metrics = ("accuracy",)

    def __init__(self, vocab_size: int = 17, seq_len: int = 64, n_classes: int = 10, reference: Mapping[str, Any] | None = None) -> None:
        for name, value, right in (("vocab_size", vocab_size, 17), ("seq_len", seq_len, 64), ("n_classes", n_classes, 10)):
            if value != right:
                raise ValueError(f"task.{name} must be {right}, which the images have, got {value}")
        self.vocab_size, self.seq_len, self.n_classes = vocab_size, seq_len, n_classes
        self.reference = check_reference(reference)

    @cached_property
    def images(self) -> tuple[np.ndarray, np.ndarray]:
        """(1797, 64) grey levels 0 .. 16, and (1797,) digits, both int64."""
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ConfigError("task=digits takes its images from scikit-learn: pip install scikit-learn") from error
        pixels, digits = load_digits(return_X_y=True)
        return pixels.astype(np.int64), digits.astype(np.int64)

    def split(self, name: str, scale: int = 1) -> DigitsSplit:
        if scale != 1:
            raise ConfigError("task=digits has images of one size: leave task.eval_lengths at [1]")
        return DigitsSplit(self, name)

    def facts(self) -> Mapping[str, Any]:
        return {"sha256": hashlib.sha256(b"".join(part.astype("<i8").tobytes() for part in self.images)).hexdigest()}

    def references(self, split: str) -> dict[str, float]:
        return constant_answers(self.split("train"), self.split(split))

    def describe(self) -> str:
        sizes = ", ".join(f"{name} {len(self.split(name)):,}" for name in SPLITS)
        return f"digits: images of {sizes}; {duplicates(self)}"


class DigitsSplit(Split):
    def __init__(self, task: Digits, name: str) -> None:
        self.pixels, self.digits = task.images
        order = np.random.default_rng(ORDER).permutation(len(self.digits))
        first = {"test": 0, "val": HELD_OUT, "train": 2 * HELD_OUT}[name]
        self.order = order[first : len(order) if name == "train" else first + HELD_OUT]

    def __len__(self) -> int:
        return len(self.order)

    def batch(self, indices: Indices) -> Batch:
        chosen = self.order[np.asarray(indices, dtype=np.int64)]
        return Batch(torch.from_numpy(self.pixels[chosen]), torch.from_numpy(self.digits[chosen]))
