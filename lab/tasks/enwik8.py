"""enwik8: the first 10^8 bytes of the English Wikipedia of 3 March 2006, byte by byte; 90 million to train on, 5 each to validate and test.

It is one file of exactly these bytes, which is looked for where `path` says, else in the data folder (LAB_DATA, or ~/.cache/lab); its size
and its SHA-256 are checked. Nothing is fetched unless `download` is set. Source: http://mattmahoney.net/dc/textdata.html
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lab.config import ConfigError
from lab.tasks.base import SPLITS
from lab.tasks.corpus import Corpus
from lab.tasks.download import fetch_member
from lab.tasks.prepared import Content

URL, MEMBER = "https://mattmahoney.net/dc/enwik8.zip", "enwik8"
ZIPPED = 36_445_475  # bytes
SIZE = 100_000_000  # bytes
SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
SYMBOLS = 205  # different bytes that occur in it
SHARES = (18, 1, 1)  # of train, val and test, in twentieths
SECONDS = 1800  # for the download


class Enwik8(Corpus):
    """vocab_size 256: tokens are bytes; 205: the bytes that occur, numbered in their order. path: the file; None: `enwik8` in the data
    folder. download: fetch it where it is not. limit_bytes: go by so many bytes from its start alone, shared out in the same proportion:
    for a small run, whose figures are not those of enwik8."""

    name = "enwik8"

    def __init__(
        self,
        vocab_size: Literal[256, 205] = 256,
        seq_len: int = 512,
        path: str | None = None,
        download: bool = False,
        limit_bytes: int | None = None,
        val_bytes: int | None = 262144,
        eval_stride: int | None = None,
        eval_lengths: Sequence[int] = (1,),
        carry_state: bool = False,
    ) -> None:
        if vocab_size not in (256, SYMBOLS):
            raise ValueError(f"task.vocab_size must be 256 (bytes) or {SYMBOLS} (the bytes that occur), got {vocab_size}")
        if limit_bytes is not None and not 20 <= limit_bytes <= SIZE:
            raise ValueError(f"task.limit_bytes must lie in 20 to {SIZE:,}, or be null for all of enwik8, got {limit_bytes}")
        super().__init__(vocab_size, seq_len, val_bytes, eval_stride, eval_lengths, carry_state)
        self.file = self.folder / MEMBER if path is None else Path(path).expanduser()
        self.download, self.limit = download, SIZE if limit_bytes is None else limit_bytes
        self._symbols: bytes | None = None

    def keys(self) -> list[Callable[[], str]]:
        # Not the file: it has to be this one, and once prepared, a run needs it no more.
        return [lambda: f"{SHA256}\n{self.limit}\n{self.vocab_size}"]

    def read(self) -> Content:
        if not self.file.exists() and self.download:
            fetch_member(URL, ZIPPED, MEMBER, SIZE, SHA256, self.file, SECONDS)
        self._check()
        content = np.memmap(self.file, np.uint8, "r")
        facts: dict[str, Any] = {} if self.limit == SIZE else {"limit_bytes": self.limit}
        tokenizer = None
        if self.vocab_size == SYMBOLS:
            occurring = np.flatnonzero(np.bincount(content, minlength=256))  # in all of it, whatever limit_bytes is
            number = np.zeros(256, np.uint8)
            number[occurring] = np.arange(len(occurring))
            tokenizer = json.dumps(occurring.tolist())
            facts["symbols"] = len(occurring)
        ends = np.cumsum([0, *(self.limit * share // sum(SHARES) for share in SHARES)]).tolist()
        ends[-1] = self.limit
        parts = {split: content[ends[i] : ends[i + 1]] for i, split in enumerate(SPLITS)}
        return Content({split: [part if tokenizer is None else number[part]] for split, part in parts.items()}, facts, tokenizer=tokenizer)

    def _check(self) -> None:
        if not self.file.is_file():
            raise ConfigError(
                f"task.path: there is no file {self.file}: put the file {MEMBER} there ({SIZE:,} bytes, from {URL}), name it with "
                f"task.path=FILE, or let task.download=true fetch it ({ZIPPED:,} bytes)"
            )
        size = self.file.stat().st_size
        if size != SIZE:
            zipped = f"; it is the archive, which holds it: unzip {self.file}" if size == ZIPPED else ""
            raise ConfigError(f"task.path: {self.file} has {size:,} bytes, {MEMBER} has {SIZE:,}: it is another file{zipped}")
        with self.file.open("rb") as file:
            digest = hashlib.sha256()
            while piece := file.read(1 << 20):
                digest.update(piece)
        if digest.hexdigest() != SHA256:
            raise ConfigError(f"task.path: {self.file} has the SHA-256 {digest.hexdigest()}, {MEMBER} has {SHA256}: it is another file")

    # ------------------------------------------------------------------ the 205 symbols

    @property
    def symbols(self) -> bytes | None:
        """The byte of each token; None: a token is its byte."""
        if self.vocab_size == 256:
            return None
        if self._symbols is None:
            self._symbols = bytes(json.loads(self.prepared.tokenizer or "[]"))
        return self._symbols

    @property
    def encoding(self) -> str:  # type: ignore[override]
        if self.symbols is None:
            return "bytes of UTF-8"
        return f"index into the {len(self.symbols)} bytes that occur in enwik8, which are UTF-8, in order: {json.dumps(list(self.symbols))}"

    @property
    def begin_token(self) -> int:  # type: ignore[override]
        return 10 if self.symbols is None else max(self.symbols.find(b"\n"), 0)

    def restore(self, stored: Mapping[str, Any]) -> None:
        if "tokenizer" in stored:
            self._symbols = bytes(json.loads(stored["tokenizer"]))

    def spell(self, tokens: np.ndarray) -> bytes:
        return super().spell(tokens) if self.symbols is None else np.frombuffer(self.symbols, np.uint8)[tokens].tobytes()

    def encode(self, text: str) -> list[int]:
        content = super().encode(text)
        if self.symbols is None:
            return content
        for byte in content:
            if byte not in self.symbols:
                raise ConfigError(
                    f"the byte {byte:#04x} does not occur in enwik8: it is none of the {len(self.symbols)} tokens of this model"
                )
        return [self.symbols.index(byte) for byte in content]
