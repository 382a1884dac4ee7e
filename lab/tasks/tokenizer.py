"""Between text and tokens: bytes as they are, or a byte-level BPE that is trained on the data. Both give back every text byte by byte.

`pieces` are the bytes that each token stands for. The token after the last one ends a document; it is the corpus's, no tokenizer knows it.
BPE: arXiv:1508.07909; over bytes, as in GPT-2.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from lab.config import ConfigError

# The package warns in each process that is forked after it has used threads, unless it was told to; nothing encodes in those processes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


class Tokenizer(ABC):
    pieces: Sequence[bytes]
    json: str | None = None  # what makes it again; None: nothing has to be kept

    @abstractmethod
    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]: ...

    @cached_property
    def sha256(self) -> str | None:
        return None if self.json is None else hashlib.sha256(self.json.encode()).hexdigest()


class Bytes(Tokenizer):
    pieces = tuple(bytes([byte]) for byte in range(256))

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, np.uint8) for text in texts]


class BPE(Tokenizer):
    """json: of the package tokenizers, a byte-level BPE."""

    def __init__(self, json: str) -> None:
        self.json = json
        self.tokenizer: Any = _package().Tokenizer.from_str(json)
        byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        names = (self.tokenizer.id_to_token(i) for i in range(self.tokenizer.get_vocab_size()))
        self.pieces = [bytes(byte_of[character] for character in name) for name in names]

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        try:
            strings = [text.decode() for text in texts]
        except UnicodeDecodeError as error:
            raise ConfigError(f"task.tokenizer: a document is no UTF-8 text ({error}); task.tokenizer=bytes takes any bytes") from error
        return [np.array(encoding.ids, np.int64) for encoding in self.tokenizer.encode_batch_fast(strings, add_special_tokens=False)]


def train_bpe(texts: Iterable[bytes], size: int) -> BPE:
    """A BPE of `size` tokens, the 256 bytes among them. ConfigError where the texts do not give so many."""
    tokenizers = _package()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator((text.decode("utf-8", "replace") for text in texts), trainer)
    found = tokenizer.get_vocab_size()
    if found != size:
        raise ConfigError(f"task.vocab_size: the training documents give {found} tokens, and one ends a document: at most {found + 1}")
    return BPE(tokenizer.to_str())


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table: printable ones for themselves)."""
    itself = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    return [chr(byte) if byte in itself else chr(256 + others.index(byte)) for byte in range(256)]


def _package() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ConfigError("task.tokenizer: bpe needs the package tokenizers: pip install tokenizers") from error
    return tokenizers
