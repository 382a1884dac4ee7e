"""A file from an archive on the web: fetched with a time limit, gone on with after a break, put in its place whole."""

from __future__ import annotations

import shutil
import time
import urllib.error
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path

from lab.config import ConfigError
from lab.files import atomic
from lab.tasks.prepared import Progress

SILENCE = 30  # seconds without a byte


def fetch_member(url: str, size: int, member: str, target: Path, seconds: float) -> None:
    """Puts `member` of the zip archive at `url`, which has `size` bytes, at `target`. What has been fetched is kept beside it until it is
    whole, and gone on with by the next call. ConfigError where that does not succeed within `seconds`."""
    part = target.with_name(f"{target.name}.zip.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, size, part, seconds)
        with zipfile.ZipFile(part) as archive, archive.open(member) as packed, atomic(target) as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        part.unlink()
        raise ConfigError(f"task.download: what {url} sends is no archive with {member}: {error}") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        kept = part.stat().st_size if part.exists() else 0
        raise ConfigError(
            f"task.download: {url} could not be fetched ({reason}); {kept:,} of {size:,} bytes are in {part}, and the same command goes on "
            "with them"
        ) from error
    part.unlink()


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
            while piece := answer.read1(1 << 16):
                done += len(piece)
                file.write(piece)
                progress.say(f"{done:,} of {size:,} bytes")
                if time.monotonic() > end:
                    raise TimeoutError(f"not done after {seconds:.0f} seconds")
    if done != size:
        if done > size:
            part.unlink()
        raise OSError(f"it ended after {done:,} bytes")
