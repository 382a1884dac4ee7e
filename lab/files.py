"""Files that a run stores: written atomically, read with suspicion."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    with atomic(path) as file:
        file.write(content)


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` that takes its place in the end: readers see the old one or the new one, a crash leaves one of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(strict(value), indent=1) + "\n")


def strict(value: Any) -> Any:
    """The same without NaN and infinities, which JSON does not have: null in their place."""
    if isinstance(value, Mapping):
        return {key: strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync_folder(path: Path) -> None:
    """Makes a rename in the folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unlike(stored: Any, types: Mapping[str, type]) -> str | None:
    """What a file that was read lacks of what a run would have stored in it; None where it has these keys with values of these types."""
    if not isinstance(stored, dict):
        return f"it holds no keys and values but a {type(stored).__name__}"
    for key, wanted in types.items():
        if key not in stored:
            return f"it lacks {key}"
        if not isinstance(stored[key], wanted):
            return f"its {key} is a {type(stored[key]).__name__}, not a {wanted.__name__}"
    return None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, [] where there is none; a last line cut off by a kill is left out."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def by_step(rows: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """The rows of each step as one, {step: {name: value}}, in the order of the steps."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update((name, value) for name, value in row.items() if name != "step")
    return dict(sorted(merged.items()))
