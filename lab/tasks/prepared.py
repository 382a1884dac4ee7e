"""Prepared tokens: one file of train, val and test in a row, and a JSON beside it that says what they are; read through a memory map.

Both are made once, in the data folder: LAB_DATA, or ~/.cache/lab. Each is written beside its place and renamed, the JSON last, so that a
kill leaves nothing or all of it. A lock lets one process prepare while others wait for it; where the file system has no locks, several do
the same work, and equal keys give equal bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lab.config import ConfigError
from lab.files import atomic, write_bytes
from lab.tasks.base import SPLITS

FORMAT = 2  # of the prepared files; part of their names
HASHED = 1 << 30  # bytes: a larger file is known by its size alone when it is opened again


@dataclass
class Content:
    """What a corpus prepares. parts: of train, val and test, in this order, pieces of bytes, or arrays of `dtype`. facts: of metrics.json;
    may be filled while the parts are read. tokenizer: what tells tokens from text, where that was made of the data. also: another key that
    stands for the same content."""

    parts: Mapping[str, Iterable[bytes | np.ndarray]]
    facts: dict[str, Any]
    dtype: str = "uint8"
    tokenizer: str | None = None
    also: str | None = None


class Prepared(NamedTuple):
    """A file of tokens, and where in it each split lies."""

    file: Path
    facts: dict[str, Any]  # sha256, bytes, and what the corpus says of itself
    splits: dict[str, tuple[int, int]]  # first token, and the one after the last
    dtype: str
    tokenizer: str | None


class Tokens:
    """The tokens [first, end) of a file."""

    def __init__(self, file: Path, dtype: str, first: int, end: int) -> None:
        self.file, self.dtype, self.first, self.end = file, dtype, first, end
        self._map: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}  # another process maps the file itself: a pickled map is all of its bytes

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def array(self) -> np.ndarray:
        if self._map is None:
            self._map = np.memmap(self.file, self.dtype, "r")[self.first : self.end]
        return self._map


def data_folder() -> Path:
    return Path(os.environ.get("LAB_DATA") or "~/.cache/lab").expanduser()


def prepare(folder: Path, name: str, keys: Sequence[Callable[[], str]], read: Callable[[], Content]) -> Prepared:
    """The prepared tokens of a corpus, made where they are not there, or not whole. ConfigError where the folder cannot be written.

    keys: texts that change whenever `read` would give something else; each later one costs more to find out and holds where the ones before
    it have changed for nothing, as a date. What is found by a later one is noted under the earlier ones.
    """
    missing = []
    for key in keys:
        stem = _stem(folder, name, key())
        found = _open(stem)
        if found is not None:
            break
        missing.append(stem)
    else:
        stem = missing.pop()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with alone(stem.with_suffix(".lock"), f"{name}: another process prepares it; waiting") as locked:
                found = _open(stem) or _make(folder, name, stem, read, locked)
        except OSError as error:
            raise ConfigError(
                f"task: {name} cannot be prepared in {folder} ({error.strerror}): let LAB_DATA name another folder"
            ) from error
    for other in missing:
        with suppress(OSError):  # a folder that is only read: the key is found out again the next time
            write_bytes(other.with_suffix(".json"), stem.with_suffix(".json").read_bytes())
    return found


def _stem(folder: Path, name: str, key: str) -> Path:
    return folder / f"{name}-{hashlib.sha256(f'{FORMAT} {key}'.encode()).hexdigest()[:16]}"


def _make(folder: Path, name: str, stem: Path, read: Callable[[], Content], locked: bool) -> Prepared:
    for stale in folder.glob(f".{stem.name}.*.tmp") if locked else ():  # of a process that was killed: this one holds the lock
        stale.unlink(missing_ok=True)
    content, digest = read(), hashlib.sha256()
    file, size, splits = stem.with_suffix(".bin"), np.dtype(content.dtype).itemsize, {}
    with atomic(file) as out:
        end = 0
        for split in SPLITS:
            first = end
            for piece in content.parts[split]:
                raw = memoryview(piece).cast("B")  # type: ignore[arg-type]  # an array is a buffer
                out.write(raw)
                digest.update(raw)
                end += len(raw) // size
            splits[split] = [first, end]
        if any(first == end for first, end in splits.values()):
            raise ConfigError(f"task: {name} is too small: one of train, val and test would be without bytes ({content.facts})")
    facts = {"sha256": digest.hexdigest(), "bytes": end * size, **content.facts}
    document = {"facts": facts, "splits": splits, "file": file.name, "dtype": content.dtype, "tokenizer": content.tokenizer}
    text = json.dumps(document, indent=1).encode()
    if content.also is not None:
        write_bytes(_stem(folder, name, content.also).with_suffix(".json"), text)
    write_bytes(stem.with_suffix(".json"), text)
    found = _open(stem)
    if found is None:
        raise ConfigError(f"task: {stem}.bin is not what was just written to it: is the disk full, or is another program there?")
    return found


def _open(stem: Path) -> Prepared | None:
    """None where the files are missing, or are not what they should be: cut off, or of something else."""
    file = stem.with_suffix(".bin")
    try:
        document = json.loads(stem.with_suffix(".json").read_bytes())
        facts, dtype = document["facts"], document["dtype"]
        splits = {split: (int(a), int(b)) for split, (a, b) in document["splits"].items()}
        file, size = stem.with_name(document["file"]), splits["test"][1] * np.dtype(dtype).itemsize
        whole = file.stat().st_size == size
        if whole and size <= HASHED:
            whole = hashlib.sha256(np.memmap(file, np.uint8, "r").data).hexdigest() == facts["sha256"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        print(f"{file} is damaged, or of something else: it is made anew", file=sys.stderr, flush=True)
        return None
    return Prepared(file, facts, splits, dtype, document["tokenizer"])


@contextmanager
def alone(path: Path, waiting: str) -> Iterator[bool]:
    """One process at a time is inside; False in a file system without locks, where several may be. waiting: what others say on stderr."""
    progress, locked = Progress(waiting), True
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.say("")
                time.sleep(0.1)
                continue
            except OSError:
                locked = False
            break
        yield locked


class Progress:
    """Says how far something is, on stderr: nothing in the first seconds, then a line every few seconds."""

    def __init__(self, what: str, first: float = 2.0, every: float = 10.0) -> None:
        self.what, self.every, self.start = what, every, time.monotonic()
        self.next = self.start + first

    def say(self, how_far: str) -> None:
        now = time.monotonic()
        if now >= self.next:
            print(f"{self.what}{how_far} ({now - self.start:.0f} s)", file=sys.stderr, flush=True)
            self.next = now + self.every
