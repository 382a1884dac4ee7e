"""Byte-level language modelling: predict each byte of a text from the bytes before it. The base of every corpus of raw bytes.

    bytes      i m p o r t   r e          one split; windows of seq_len = 4, stride 4
    inputs     \\n i m p     o r t .      the byte before each target; the first byte of a split is predicted from a newline
    targets    i m p o       r t . r

A split is a row of windows whose targets are all of its bytes, each exactly once. With a smaller stride windows overlap, and each scores
only what no window before it has scored, so that a byte has at least seq_len - stride bytes before it in its window. The last window is
moved back to end with the split: all windows are of one length. Training takes the windows of stride seq_len, shuffled in each epoch.

The prepared bytes are one file, train, val and test in a row, and a JSON beside it that says what they are. Both are written once, to the
data folder: LAB_DATA, or ~/.cache/lab. They are read through a memory map.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lab.config import ConfigError
from lab.files import write_bytes
from lab.tasks.base import IGNORE, SPLITS, Batch, Indices, Split, Task

START = 10  # a newline: what comes before the first byte of a split
FORMAT = 1  # of the prepared files; part of their names


class Prepared(NamedTuple):
    """A file of bytes, and where in it each split lies."""

    file: Path
    facts: dict[str, Any]  # sha256, bytes, and what the corpus says of itself
    splits: dict[str, tuple[int, int]]  # first byte, and the one after the last


class ByteCorpus(Task):
    """A corpus writes `key` and `read`. val_bytes: validation during training scores about so many, spread over the split; None: all.
    eval_stride: of the windows that validation and lab-eval score, in bytes at the length seq_len, in proportion at others; None: seq_len.
    """

    text = True
    encoding = "bytes of UTF-8"
    metrics = ("bits_per_byte", "token_accuracy")
    name: str  # begins the names of the prepared files

    def __init__(
        self,
        vocab_size: int = 256,
        seq_len: int = 256,
        val_bytes: int | None = 65536,
        eval_stride: int | None = None,
        eval_lengths: Sequence[int] = (1,),
    ) -> None:
        if vocab_size != 256:
            raise ValueError(f"task.vocab_size must be 256, the tokens are bytes; got {vocab_size}")
        if seq_len < 1:
            raise ValueError(f"task.seq_len must be at least 1, got {seq_len}")
        if val_bytes is not None and val_bytes < 1:
            raise ValueError(f"task.val_bytes must be at least 1, or null for all, got {val_bytes}")
        if eval_stride is not None and not 1 <= eval_stride <= seq_len:
            raise ValueError(f"task.eval_stride must be between 1 and task.seq_len {seq_len}, or null for that, got {eval_stride}")
        if any(scale < 1 for scale in eval_lengths):
            raise ValueError(f"task.eval_lengths must be multiples of seq_len from 1 on, got {list(eval_lengths)}")
        self.vocab_size, self.seq_len, self.val_bytes = vocab_size, seq_len, val_bytes
        self.eval_stride = seq_len if eval_stride is None else eval_stride
        self.folder = Path(os.environ.get("LAB_DATA") or "~/.cache/lab").expanduser()
        self.eval_lengths = tuple(eval_lengths)

    @abstractmethod
    def key(self) -> str:
        """A text that changes whenever `read` would: versions, sizes and dates of what it reads, not their content."""

    @abstractmethod
    def read(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        """The bytes of train, val and test, and facts about them for metrics.json. ConfigError where there is nothing to read."""

    # ------------------------------------------------------------------ what every task offers

    @cached_property
    def prepared(self) -> Prepared:
        return prepare(self.folder, self.name, self.key(), self.read)

    def facts(self) -> Mapping[str, Any]:
        return self.prepared.facts

    def split(self, name: str, scale: int = 1) -> Windows:
        first, end = self.prepared.splits[name]
        context = self.seq_len * scale
        if end - first < context:
            raise ConfigError(f"the {name} split of {self.name} has {end - first:,} bytes, fewer than one input of {context}: task.seq_len")
        return Windows(self.prepared.file, first, end, context, context if name == "train" else self.eval_stride * scale)

    def validation(self) -> Split:
        windows = self.split("val")
        wanted = len(windows) if self.val_bytes is None else math.ceil(self.val_bytes / windows.stride)
        return windows if wanted >= len(windows) else Part(windows, np.linspace(0, len(windows) - 1, wanted).round().astype(np.int64))

    def references(self, split: str) -> dict[str, float]:
        """Bits per byte of a whole split without a model. unigram: a code of the frequencies of the training bytes (each counted once more,
        so that none is impossible). gzip_9: the split as one file."""
        train, ours = self.counts("train"), self.counts(split)
        surprise = -np.log2((train + 1) / (train + 1).sum())
        packed = gzip.compress(self.bytes_of(split).tobytes(), 9, mtime=0)
        return {"uniform": 8.0, "unigram": float((ours * surprise).sum() / ours.sum()), "gzip_9": 8 * len(packed) / int(ours.sum())}

    def bytes_of(self, split: str) -> np.ndarray:
        """(n,) uint8, a memory map"""
        first, end = self.prepared.splits[split]
        return np.memmap(self.prepared.file, np.uint8, "r")[first:end]

    def counts(self, split: str) -> np.ndarray:
        """(256,) how often each byte occurs in a split; by pieces, as counting makes eight bytes of each."""
        content, size = self.bytes_of(split), 1 << 20
        return np.sum([np.bincount(content[i : i + size], minlength=256) for i in range(0, len(content), size)], axis=0)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))  # bytes of a command line that are no UTF-8 come back as they were

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")

    def describe(self) -> str:
        sizes = ", ".join(f"{name} {end - first:,}" for name, (first, end) in self.prepared.splits.items())
        facts = ", ".join(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in self.facts().items())
        return f"{self.name}: {facts}; bytes of {sizes}; in {self.prepared.file}"


class Windows(Split):
    """The windows of the bytes [first, end) of a file, which are at least `context`. Window k ends at context + k stride, or at the end."""

    def __init__(self, file: Path, first: int, end: int, context: int, stride: int) -> None:
        self.file, self.first, self.n, self.context, self.stride = file, first, end - first, context, stride
        self._bytes: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_bytes": None}  # another process maps the file itself: a pickled map is all of its bytes

    def __len__(self) -> int:
        return 1 + math.ceil((self.n - self.context) / self.stride)

    def ends(self, indices: np.ndarray) -> np.ndarray:
        """Where windows end and the ones before them have ended: (B,) -> (B,) in [context, n]; 0 before the first."""
        return np.where(indices < 0, 0, np.minimum(self.context + indices * self.stride, self.n))

    def batch(self, indices: Indices) -> Batch:
        if self._bytes is None:
            self._bytes = np.memmap(self.file, np.uint8, "r")[self.first : self.first + self.n]
        rows = np.asarray(indices, dtype=np.int64)
        end = self.ends(rows)[:, None]
        place = end - self.context + np.arange(-1, self.context)  # (B, 1 + L): the byte before each window, and the window
        tokens = self._bytes[place].astype(np.int64)  # place -1 is the last byte, for a moment
        tokens[place < 0] = START
        targets = torch.from_numpy(tokens[:, 1:].copy())
        targets[torch.from_numpy(place[:, 1:] < self.ends(rows - 1)[:, None])] = IGNORE
        return Batch(inputs=torch.from_numpy(tokens[:, :-1].copy()), targets=targets)

    def facts(self) -> dict[str, int]:
        return {"scored_bytes": self.n, "context": self.context, "stride": self.stride}


class Part(Split):
    """Some windows of a split."""

    def __init__(self, whole: Windows, indices: np.ndarray) -> None:
        self.whole, self.indices = whole, indices

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Indices) -> Batch:
        return self.whole.batch(self.indices[np.asarray(indices, dtype=np.int64)])

    def facts(self) -> dict[str, int]:
        scored = self.whole.ends(self.indices) - self.whole.ends(self.indices - 1)
        return self.whole.facts() | {"scored_bytes": int(scored.sum())}


# ---------------------------------------------------------------------- the prepared file


def prepare(folder: Path, name: str, key: str, read: Callable[[], tuple[dict[str, bytes], dict[str, Any]]]) -> Prepared:
    """The prepared bytes of a corpus, made where they are not there, or not whole. ConfigError where the folder cannot be written.

    Two processes may do so at once: each writes files of its own and renames them, and equal keys give equal bytes.
    """
    stem = folder / f"{name}-{hashlib.sha256(f'{FORMAT} {key}'.encode()).hexdigest()[:16]}"
    found = _open(stem)
    if found is not None:
        return found
    parts, facts = read()
    if any(not parts[split] for split in SPLITS):
        raise ConfigError(f"task: {name} is too small: one of train, val and test would be without bytes ({facts})")
    content = b"".join(parts[split] for split in SPLITS)
    ends = np.cumsum([0, *(len(parts[split]) for split in SPLITS)]).tolist()
    splits = {split: [ends[i], ends[i + 1]] for i, split in enumerate(SPLITS)}
    facts = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), **facts}
    try:
        write_bytes(stem.with_suffix(".bin"), content)
        write_bytes(stem.with_suffix(".json"), json.dumps({"facts": facts, "splits": splits}, indent=1).encode())
    except OSError as error:
        raise ConfigError(f"task: {name} cannot be prepared in {folder} ({error.strerror}): let LAB_DATA name another folder") from error
    found = _open(stem)
    if found is None:
        raise ConfigError(f"task: {stem}.bin is not what was just written to it: is the disk full, or is another program there?")
    return found


def _open(stem: Path) -> Prepared | None:
    """None where the files are missing, or are not what they should be: cut off, or of something else."""
    file = stem.with_suffix(".bin")
    try:
        document = json.loads(stem.with_suffix(".json").read_bytes())
        facts, splits = document["facts"], {split: (int(a), int(b)) for split, (a, b) in document["splits"].items()}
        whole = hashlib.sha256(np.memmap(file, np.uint8, "r").data).hexdigest() == facts["sha256"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        print(f"{file} is damaged, or of something else: it is made anew", file=sys.stderr, flush=True)
        return None
    return Prepared(file, facts, splits)
