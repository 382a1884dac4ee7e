"""A file from an archive on the web: fetched with a time limit, gone on with after a break, put in its place whole."""

from __future__ import annotations

import hashlib
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import IO

from lab.config import ConfigError
from lab.files import atomic
from lab.tasks.prepared import Progress, alone

SILENCE = 30  # seconds without a byte
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, KeyError)  # what reading an archive raises


def fetch_member(url: str, size: int, member: str, length: int, sha256: str, target: Path, seconds: float) -> None:
    """Puts `member` of the zip archive at `url`, which has `size` bytes, at `target`, if it has `length` bytes with this SHA-256. What has
    been fetched is kept beside it until it is whole, and gone on with by the next call; one process at a time fetches, and others wait.
    ConfigError where that does not succeed within `seconds`."""
    part = target.with_name(f"{target.name}.zip.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with alone(target.with_name(f"{target.name}.lock"), f"{url}: another process fetches it; waiting"):
            if target.exists():  # that process has fetched it
                return
            _fetch(url, size, part, seconds)
            try:
                with zipfile.ZipFile(part) as archive, archive.open(member) as packed, atomic(target) as file:
                    _unpack(packed, file, length, sha256)
            except DAMAGED as error:
                part.unlink(missing_ok=True)
                raise ConfigError(f"task.download: what {url} sends is no archive with {member}: {error}") from error
            part.unlink(missing_ok=True)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        kept = part.stat().st_size if part.exists() else 0
        raise ConfigError(
            f"task.download: {url} could not be fetched ({reason}); {kept:,} of {size:,} bytes are in {part}, and the same command goes on "
            "with them"
        ) from error


def _fetch(url: str, size: int, part: Path, seconds: float) -> None:
    end, progress = time.monotonic() + seconds, Progress(f"{url}: ")
    done = part.stat().st_size if part.exists() else 0
    if done >= size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-", "User-Agent": "lab"})
    with urllib.request.urlopen(request, timeout=SILENCE) as answer:
        resumed = answer.status == 206
        with part.open("ab" if resumed else "wb") as file:
            done = done if resumed else 0
            while done < size and (piece := answer.read1(min(1 << 16, size - done))):
                done += len(piece)
                file.write(piece)
                progress.say(f"{done:,} of {size:,} bytes")
                if time.monotonic() > end:
                    raise TimeoutError(f"not done after {seconds:.0f} seconds")
    if done != size:
        raise OSError(f"it ended after {done:,} bytes")


def _unpack(packed: IO[bytes], file: IO[bytes], length: int, sha256: str) -> None:
    done, digest = 0, hashlib.sha256()
    while piece := packed.read(min(1 << 20, length + 1 - done)):  # one byte more shows that there are more
        done += len(piece)
        digest.update(piece)
        file.write(piece)
    if done != length or digest.hexdigest() != sha256:
        size = f"more than {length:,}" if done > length else f"{done:,}"
        raise zipfile.BadZipFile(f"it holds another file of that name, of {size} bytes, with the SHA-256 {digest.hexdigest()}")
