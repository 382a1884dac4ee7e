"""Text of your own: files (text, JSON Lines, Parquet), or a data set of the Hugging Face Hub, as bytes or by a BPE that is trained on it.

    stream of a split     T h e   c a t END A   d o g END       the documents of the split, each with the end token behind it
    inputs                END T h e   c a t                     windows of the stream (lab/tasks/windows.py)
    targets               T h e   c a t END

The documents are shared out by the digest of their content (`share_out`), so that equal ones are in one split. Empty ones are left out.
The tokens are prepared once, in the data folder, and known by the content of the files: a file that has only moved, or got another date,
is read again but not prepared again. A data set of the Hub is known by its name, and its first reading is kept until `revision` names
another. A tokenizer that was trained is in every checkpoint, and lab-eval and lab-generate go by that one.
The end token counts as no byte, so that bits per byte charge a model for saying where documents end, whatever its tokens are.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lab.config import ConfigError
from lab.tasks.base import SPLITS
from lab.tasks.corpus import Corpus
from lab.tasks.documents import Spool, Unit, find_files, of_files, of_hub, share_out
from lab.tasks.prepared import Content, Progress
from lab.tasks.tokenizer import BPE, Bytes, Tokenizer, train_bpe

BATCH = 1 << 20  # bytes that are encoded together
BPE_BYTES = 100_000_000  # of the training documents, which a BPE is trained on
BPE_ENCODING = (
    "byte-level BPE; the last token ends a text; the tokenizer is the text at ['lab']['task']['tokenizer'] of the checkpoint, a "
    "tokenizer.json of the package tokenizers"
)
Piece = np.ndarray


class Text(Corpus):
    """path: files, names or patterns; or hub: a data set's name, with hub_config, hub_split and revision. field: of JSON Lines, Parquet and
    the Hub, what holds the text. documents: what a document of a text file is. vocab_size: with the end token, so 257 for bytes.
    limit_bytes: reading ends with the document that reaches so many."""

    name = "text"
    metrics = ("bits_per_byte", "perplexity", "token_accuracy")

    def __init__(
        self,
        vocab_size: int = 257,
        seq_len: int = 256,
        path: str | Sequence[str] | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        hub_split: str = "train",
        revision: str | None = None,
        streaming: bool = False,
        field: str = "text",
        documents: Unit = "file",
        tokenizer: Literal["bytes", "bpe"] = "bytes",
        val_share: float = 0.05,
        test_share: float = 0.05,
        limit_bytes: int | None = None,
        val_bytes: int | None = 65536,
        eval_stride: int | None = None,
        eval_lengths: Sequence[int] = (1,),
        carry_state: bool = False,
    ) -> None:
        if (path is None) == (hub is None):
            raise ValueError("task.path names the files of task=text, or task.hub a data set of the Hub: one of them must be set")
        if tokenizer == "bytes" and vocab_size != 257:
            raise ValueError(
                f"task.vocab_size must be 257 for task.tokenizer=bytes (256 bytes, and the end of a document), got {vocab_size}"
            )
        if tokenizer == "bpe" and vocab_size < 258:
            raise ValueError(f"task.vocab_size must be at least 258 for task.tokenizer=bpe, got {vocab_size}")
        if not (0 < val_share and 0 < test_share and val_share + test_share < 1):
            raise ValueError(f"task.val_share and test_share must be above 0 and below 1 together, got {val_share} and {test_share}")
        if limit_bytes is not None and limit_bytes < 1:
            raise ValueError(f"task.limit_bytes must be at least 1, or null for all, got {limit_bytes}")
        super().__init__(vocab_size, seq_len, val_bytes, eval_stride, eval_lengths, carry_state)
        self.path, self.hub = path, None if hub is None else (hub, hub_config, hub_split, revision)
        self.streaming, self.field, self.limit = streaming, field, limit_bytes
        self.documents: Unit = documents
        self.kind, self.val_share, self.test_share = tokenizer, val_share, test_share
        self.begin_token = self.stop_token = vocab_size - 1
        self.encoding = "bytes of UTF-8; 256 ends a text" if tokenizer == "bytes" else BPE_ENCODING
        self._tokenizer: Tokenizer | None = Bytes() if tokenizer == "bytes" else None

    # ------------------------------------------------------------------ what identifies the tokens

    def keys(self) -> list[Callable[[], str]]:
        how = [self.field, self.documents, self.val_share, self.test_share, self.limit]
        tokens = [self.kind, self.vocab_size, self.tokenizer_hash]
        if self.hub is not None:
            if Path(self.hub[0]).exists():  # the library would read it, and its name does not say when it changes
                raise ConfigError(f"task.hub: {self.hub[0]} is a file or folder here, not a data set of the Hub: task.path reads files")
            return [lambda: f"{self.hub}\n{how}\n{tokens}"]
        return [lambda: f"{self.dates()}\n{how}\n{tokens}", lambda: f"{self.content()}\n{how}\n{tokens}"]

    @property
    def tokenizer_hash(self) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.sha256

    @cached_property
    def files(self) -> list[Path]:
        return find_files(self.path or [])

    def dates(self) -> str:
        return str([(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in self.files])

    def content(self) -> str:
        """What the files hold, in the order of their names, and how they are read; not what they are called."""
        progress, digests = Progress("text: looking at "), []
        for file in self.files:
            digest = hashlib.sha256()
            with file.open("rb") as content:
                while piece := content.read(1 << 20):
                    digest.update(piece)
                    progress.say(str(file))
            digests.append((file.suffix, digest.hexdigest()))
        return str(digests)

    # ------------------------------------------------------------------ preparation

    def read(self) -> Content:
        spool, left_out = self._spool()
        unique = len(np.unique(spool.digests))
        if unique < len(SPLITS):
            few = f"task=text has {unique} different documents, and train, val and test need one each"
            raise ConfigError(f"{few}: task.documents=paragraph or line makes more of text files, where it is {self.documents}")
        split = share_out(spool.digests, spool.lengths, self.val_share, self.test_share)
        numbers = {name: np.flatnonzero(split == i) for i, name in enumerate(SPLITS)}
        before = self.tokenizer_hash
        tokenizer = self._tokenizer or self._train(spool, numbers["train"])
        self._tokenizer = tokenizer
        facts: dict[str, Any] = {"bytes": spool.bytes, "documents": len(spool.lengths), "duplicates": len(spool.lengths) - unique}
        facts |= {"empty": left_out} if left_out else {}
        facts |= {} if self.hub is None else {"revision": self.hub[-1]}
        facts |= {"tokenizer": self.kind if tokenizer.sha256 is None else f"{self.kind} {tokenizer.sha256}"}
        dtype = next(kind for kind in ("uint8", "uint16", "uint32") if self.vocab_size <= np.iinfo(kind).max + 1)
        parts = {name: self._encoded(spool, numbers[name], tokenizer, dtype, name) for name in SPLITS}
        also = self.keys()[-1]() if tokenizer.sha256 != before else None  # for who comes with this tokenizer
        return Content(parts, facts, dtype, tokenizer.json, also)

    def _spool(self) -> tuple[Spool, int]:
        """All documents, and the number of empty ones, which are not among them."""
        spool, empty, progress = Spool(self.folder), 0, Progress("text: read ")
        source = of_files(self.files, self.documents, self.field) if self.hub is None else of_hub(*self.hub, self.streaming, self.field)
        for document in source:
            if not document:
                empty += 1
                continue
            spool.add(document)
            progress.say(f"{spool.bytes:,} bytes, documents: {len(spool.lengths):,}")
            if self.limit is not None and spool.bytes >= self.limit:
                break
        return spool, empty

    def _train(self, spool: Spool, numbers: np.ndarray) -> BPE:
        progress = Progress("text: training the tokenizer on ")
        most = int(np.searchsorted(np.cumsum(spool.lengths[numbers]), BPE_BYTES)) + 1
        batches = spool.batches(numbers[:most], BATCH, lambda done: progress.say(f"{done:,} bytes"))
        return train_bpe(itertools.chain.from_iterable(batches), self.vocab_size - 1)

    def _encoded(self, spool: Spool, numbers: np.ndarray, tokenizer: Tokenizer, dtype: str, split: str) -> Iterator[Piece]:
        progress, total = Progress(f"text: encoding {split}, "), int(spool.lengths[numbers].sum())
        end = np.array([self.vocab_size - 1])
        for batch in spool.batches(numbers, BATCH, lambda done: progress.say(f"{done:,} of {total:,} bytes")):
            yield np.concatenate([part for tokens in tokenizer.encode(batch) for part in (tokens, end)]).astype(dtype)

    # ------------------------------------------------------------------ tokens and text

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            stored = self.prepared.tokenizer  # of this preparation, or of one that was found
            if self._tokenizer is None:
                assert stored is not None
                self._tokenizer = BPE(stored)
        return self._tokenizer

    def restore(self, stored: Mapping[str, Any]) -> None:
        if "tokenizer" in stored:
            self._tokenizer = BPE(stored["tokenizer"])

    @cached_property
    def pieces(self) -> tuple[bytes, ...]:
        return (*self.tokenizer.pieces, b"")

    @cached_property
    def token_bytes(self) -> np.ndarray:
        return np.array([len(piece) for piece in self.pieces])

    def spell(self, tokens: np.ndarray) -> bytes:
        return b"".join(map(self.pieces.__getitem__, tokens.tolist()))

    def encode(self, text: str) -> list[int]:
        content = text.encode("utf-8", "surrogateescape")
        return self.tokenizer.encode([content])[0].tolist()
