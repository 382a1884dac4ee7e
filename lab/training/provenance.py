"""Where a result comes from: the time, the code, the commit, the versions and the machine."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import time
from pathlib import Path

PATCH_LIMIT = 10_000_000  # characters of git_diff.patch


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def code_version() -> str:
    """8 hex digits of the content of the package and its native sources: two runs that differ here ran different code."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    sources = [*package.rglob("*.py"), *(package.parent / "csrc").rglob("*.[ch]*")]
    for file in sorted(sources):
        digest.update(str(file.relative_to(package.parent)).encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def git_state() -> tuple[str | None, str, list[str]]:
    """Commit, difference of the work tree to it, and untracked files of the current folder's repository; (None, "", []) outside of one."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], capture_output=True, text=True, errors="replace", timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None, "", []
    untracked = git("ls-files", "--others", "--exclude-standard") or ""
    return commit.strip(), (git("diff", "HEAD") or "")[:PATCH_LIMIT], untracked.splitlines()[:100]


def environment() -> dict[str, str]:
    """Versions and the machine, for hparams.yaml and metrics.json."""
    from importlib import metadata

    names = ("lab", "torch", "pytorch-lightning", "hydra-core", "omegaconf", "torchmetrics", "numpy")
    versions = {name: metadata.version(name) for name in names}
    return {"python": platform.python_version(), **versions, "platform": platform.platform()}
