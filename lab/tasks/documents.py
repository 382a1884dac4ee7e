"""The documents of text files, JSON Lines, Parquet and data sets of the Hugging Face Hub, one after the other, and their shares.

`Spool` holds documents on the disk, however many there are, so that a source is read once; `share_out` says which split each one is in.
"""

from __future__ import annotations

import glob
import hashlib
import json
import mmap
import re
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lab.config import ConfigError

Unit = Literal["file", "paragraph", "line"]
JSON_LINES, PARQUET = (".jsonl", ".ndjson", ".json"), (".parquet",)  # all other files are text


def find_files(path: str | Sequence[str]) -> list[Path]:
    """The files that names and patterns (with * ? [] and **) stand for, in the order of their names. ConfigError where that is none."""
    found: set[Path] = set()
    for pattern in [path] if isinstance(path, str) else path:
        names = [Path(name) for name in glob.glob(str(Path(pattern).expanduser()), recursive=True)]
        files = [name for name in names if name.is_file()]
        if not files:
            folder = f"; it is a folder: task.path={pattern}/**/*.txt would be its text files" if names else ""
            raise ConfigError(f"task.path: there is no file {pattern}{folder}")
        found.update(files)
    return sorted(found, key=Path.as_posix)


def of_files(files: Sequence[Path], unit: Unit, field: str) -> Iterator[bytes]:
    for file in files:
        try:
            if file.suffix in JSON_LINES:
                yield from _json_lines(file, field)
            elif file.suffix in PARQUET:
                load = partial(_datasets().load_dataset, "parquet", data_files=str(file), split="train", streaming=True)
                yield from _rows(load, field, "task.path", str(file))
            else:
                yield from _text(file, unit)
        except OSError as error:
            raise ConfigError(f"task.path: {file} cannot be read: {error.strerror or error}") from error


def of_hub(name: str, config: str | None, split: str, revision: str | None, streaming: bool, field: str) -> Iterator[bytes]:
    """Of a data set by its name on the Hub."""
    load = partial(_datasets().load_dataset, name, config, split=split, revision=revision, streaming=streaming)
    yield from _rows(load, field, "task.hub", name)


def _text(file: Path, unit: Unit) -> Iterator[bytes]:
    if unit == "line":
        with file.open("rb") as lines:
            yield from (line.rstrip(b"\r\n") for line in lines)
    elif unit == "file":
        yield file.read_bytes()
    else:
        with file.open("rb") as content:
            if file.stat().st_size:
                text = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)
                start = 0
                for blank in re.finditer(rb"\r?\n(?:[ \t]*\r?\n)+", text):
                    yield text[start : blank.start()]
                    start = blank.end()
                yield text[start:].rstrip(b"\r\n")


def _json_lines(file: Path, field: str) -> Iterator[bytes]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ConfigError(f"task.path: line {number} of {file} is no JSON: {error}") from error
                yield _field(row, field, f"line {number} of {file}")


def _rows(load: Callable[[], Iterable[Any]], field: str, key: str, source: str) -> Iterator[bytes]:
    try:
        for number, row in enumerate(load(), 1):  # with streaming, files are opened and fetched as they come
            yield _field(row, field, f"row {number} of {source}")
    except ConfigError:
        raise
    except Exception as error:  # the library and those below it raise of everything
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(f"{key}: {source} cannot be loaded: {said}") from error


def _field(row: Any, field: str, where: str) -> bytes:
    if not isinstance(row, Mapping) or field not in row:
        there = f"it has {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"it is a {type(row).__name__}"
        raise ConfigError(f"task.field: {where} has no field {field}; {there}")
    text = row[field]
    if not isinstance(text, str):
        raise ConfigError(f"task.field: {field} in {where} is no text but a {type(text).__name__}")
    return text.encode("utf-8", "surrogatepass")


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ConfigError("task=text needs the package datasets for Parquet and the Hub: pip install datasets") from error
    datasets.disable_progress_bars()
    return datasets


class Spool:
    """Documents in a file without a name in `folder`, which goes with this object, or with its process, however that ends."""

    def __init__(self, folder: Path) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)
        weakref.finalize(self, self.file.close)
        self._lengths, self._digests = array("q"), array("Q")
        self.bytes = 0

    def add(self, text: bytes) -> None:
        self.file.write(text)
        self._lengths.append(len(text))
        self._digests.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
        self.bytes += len(text)

    @property
    def lengths(self) -> np.ndarray:
        return np.frombuffer(self._lengths, np.int64) if self._lengths else np.empty(0, np.int64)

    @property
    def digests(self) -> np.ndarray:
        return np.frombuffer(self._digests, np.uint64) if self._digests else np.empty(0, np.uint64)

    def batches(self, which: np.ndarray, size: int, say: Callable[[int], None] = lambda done: None) -> Iterator[list[bytes]]:
        """The documents with these numbers, about `size` bytes at a time. say: is told how many bytes have been given."""
        self.file.flush()
        ends, done = np.cumsum(self.lengths), 0
        with mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            batch: list[bytes] = []
            held = 0
            for number in which.tolist():
                batch.append(content[ends[number] - self._lengths[number] : ends[number]])
                held += len(batch[-1])
                if held >= size:
                    yield batch
                    done += held
                    say(done)
                    batch, held = [], 0
            if batch:
                yield batch


def share_out(digests: np.ndarray, lengths: np.ndarray, val_share: float, test_share: float) -> np.ndarray:
    """Which of train (0), val (1) and test (2) each document is in, (N,), from its digest and its length alone: equal documents are in one
    split, and no order changes anything. In the order of the digests test takes documents until it has its share of the bytes, then val;
    the largest document does not count. Those larger than a share are for training, unless there are no others: then the smallest is taken.
    """
    unique, inverse = np.unique(digests, return_inverse=True)
    size = np.bincount(inverse, lengths, len(unique))
    split = np.zeros(len(unique), np.int8)
    for number, share in ((2, test_share), (1, val_share)):
        limit, free = share * (size.sum() - size.max()), np.flatnonzero(split == 0)
        fits = free[size[free] <= limit]
        if not len(fits):
            fits = free[[np.argmin(size[free])]]
        total = np.cumsum(size[fits])
        split[fits[total <= max(limit, total[0])]] = number
    return split[inverse]
