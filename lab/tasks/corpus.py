"""Language modelling: predict each token of a text from the tokens before it. The base of every corpus; what a token is, the corpus says.

The tokens of train, val and test are prepared once (lab/tasks/prepared.py) and read in windows (lab/tasks/windows.py). Training takes the
windows of stride seq_len, shuffled in each epoch; with carry_state contiguous streams, the state of one window carried to the next
(lab/tasks/loader.py).

A run scores bits per byte, which is comparable between tokens of any kind: all nats of the scored tokens, divided by ln 2 and by the bytes
of text that these stand for.
"""

from __future__ import annotations

import lzma
import math
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from lab.config import ConfigError
from lab.tasks.base import Split, Task
from lab.tasks.prepared import Content, Prepared, Tokens, data_folder, prepare
from lab.tasks.windows import Part, Windows

PIECE = 1 << 20  # tokens that are looked at together
COMPRESSED = 100_000_000  # bytes: of a larger split gzip and xz would take minutes, and are left out of the references


class Corpus(Task):
    """A corpus writes `keys` and `read`, and where a token is not a byte, `begin_token`, `token_bytes`, `spell`, `encode` and `decode`.

    val_bytes: validation during training scores about so many, spread over the split; None: all. eval_stride: of the windows that
    validation and lab-eval score, in tokens at the length seq_len, in proportion at others; None: seq_len. carry_state: training reads
    contiguous streams, and each window continues the state of the one before it.
    """

    text = True
    encoding: str | None = "bytes of UTF-8"
    metrics: Sequence[str] = ("bits_per_byte", "token_accuracy")
    name: str  # begins the names of the prepared files
    begin_token = 10  # what the first token of a split is predicted from: a newline

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        val_bytes: int | None,
        eval_stride: int | None,
        eval_lengths: Sequence[int],
        carry_state: bool,
    ) -> None:
        if seq_len < 1:
            raise ValueError(f"task.seq_len must be at least 1, got {seq_len}")
        if val_bytes is not None and val_bytes < 1:
            raise ValueError(f"task.val_bytes must be at least 1, or null for all, got {val_bytes}")
        if eval_stride is not None and not 1 <= eval_stride <= seq_len:
            raise ValueError(f"task.eval_stride must be between 1 and task.seq_len {seq_len}, or null for that, got {eval_stride}")
        if any(scale < 1 for scale in eval_lengths):
            raise ValueError(f"task.eval_lengths must be multiples of seq_len from 1 on, got {list(eval_lengths)}")
        self.vocab_size, self.seq_len, self.val_bytes, self.carry_state = vocab_size, seq_len, val_bytes, carry_state
        self.eval_stride = seq_len if eval_stride is None else eval_stride
        self.folder = data_folder()
        self.eval_lengths = tuple(eval_lengths)

    @abstractmethod
    def keys(self) -> Sequence[Any]:
        """Functions that give texts which change whenever `read` would give something else; the cheapest first (`prepare`)."""

    @abstractmethod
    def read(self) -> Content:
        """The tokens of train, val and test. ConfigError where there is nothing to read."""

    def spell(self, tokens: np.ndarray) -> bytes:
        """The bytes of text that tokens stand for."""
        return tokens.astype(np.uint8).tobytes()

    # ------------------------------------------------------------------ what every task offers

    @cached_property
    def prepared(self) -> Prepared:
        return prepare(self.folder, self.name, self.keys(), self.read)

    def facts(self) -> Mapping[str, Any]:
        return self.prepared.facts

    def split(self, name: str, scale: int = 1) -> Windows:
        tokens, context = self.tokens(name), self.seq_len * scale
        if len(tokens) < context:
            size = f"{len(tokens):,} {self.unit}"
            raise ConfigError(f"the {name} split of {self.name} has {size}, fewer than one input of {context}: task.seq_len")
        stride = context if name == "train" else self.eval_stride * scale
        return Windows(tokens, context, stride, self.begin_token, self.token_bytes)

    def validation(self) -> Split:
        windows = self.split("val")
        wanted = len(windows)
        if self.val_bytes is not None:
            per_token = 1.0 if self.token_bytes is None else windows.facts()["scored_bytes"] / windows.n
            wanted = max(1, math.ceil(self.val_bytes / max(windows.stride * per_token, 1e-9)))
        return windows if wanted >= len(windows) else Part(windows, np.linspace(0, len(windows) - 1, wanted).round().astype(np.int64))

    def references(self, split: str) -> dict[str, float]:
        """Bits per byte of a whole split without a model. unigram: a code of the frequencies of the training tokens, each counted once
        more, so that none is impossible. gzip_9, xz_9: the text of the split as one file."""
        train, ours = self.counts("train"), self.counts(split)
        surprise = -np.log2((train + 1) / (train + 1).sum())
        n = int(ours.sum() if self.token_bytes is None else ours @ self.token_bytes)  # bytes of text
        found = {"uniform": math.log2(self.vocab_size) * int(ours.sum()) / n, "unigram": float((ours * surprise).sum() / n)}
        if n <= COMPRESSED:
            found |= {name: 8 * size / n for name, size in compressed(map(self.spell, pieces(self.tokens(split).array)), n).items()}
        return found

    def tokens(self, split: str) -> Tokens:
        return Tokens(self.prepared.file, self.prepared.dtype, *self.prepared.splits[split])

    def bytes_of(self, split: str) -> np.ndarray:
        """(n,) the tokens of a split, a memory map"""
        return self.tokens(split).array

    def counts(self, split: str) -> np.ndarray:
        """(V,) how often each token occurs in a split; by pieces, as counting makes eight bytes of each."""
        return np.sum([np.bincount(piece, minlength=self.vocab_size) for piece in pieces(self.tokens(split).array)], axis=0)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))  # bytes of a command line that are no UTF-8 come back as they were

    def decode(self, tokens: Sequence[int]) -> str:
        return self.spell(np.asarray(tokens, dtype=np.int64)).decode("utf-8", "replace")

    @property
    def unit(self) -> str:
        return "bytes" if self.token_bytes is None else "tokens"

    def stored(self) -> dict[str, Any]:
        return {} if self.prepared.tokenizer is None else {"tokenizer": self.prepared.tokenizer}

    def describe(self) -> str:
        sizes = ", ".join(f"{name} {end - first:,}" for name, (first, end) in self.prepared.splits.items())
        facts = ", ".join(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in self.facts().items())
        return f"{self.name}: {facts}; {self.unit} of {sizes}; in {self.prepared.file}"


def pieces(tokens: np.ndarray) -> Iterator[np.ndarray]:
    return (tokens[i : i + PIECE] for i in range(0, len(tokens), PIECE))


def compressed(text: Iterator[bytes], n: int) -> dict[str, int]:
    """The sizes in bytes that gzip -9 and xz -9 make of a text of n bytes. xz's dictionary is as large as xz -9 has it, but not larger than
    the text, which would take memory for nothing."""
    dictionary = min(1 << 26, max(1 << 12, 1 << (n - 1).bit_length()))
    gz = zlib.compressobj(9, zlib.DEFLATED, 31)
    xz = lzma.LZMACompressor(filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}])
    sizes = {"gzip_9": 0, "xz_9": 0}
    for piece in text:
        sizes["gzip_9"] += len(gz.compress(piece))
        sizes["xz_9"] += len(xz.compress(piece))
    return {"gzip_9": sizes["gzip_9"] + len(gz.flush()), "xz_9": sizes["xz_9"] + len(xz.flush())}
