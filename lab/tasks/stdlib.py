"""The standard library's own source, of the Python that runs: megabytes of real text on every machine, without a download.

All .py files below sysconfig's `stdlib` folder, except what installations of one Python version differ in: packages that were installed
(site-packages, dist-packages), tests, what distributions leave out or ship apart (idlelib, tkinter, distutils, ...) and what a build writes
down about itself. Distributions may still patch a file: the SHA-256 says whether two machines have the same bytes.

A module or package stays whole and is in one split alone, so that validation and test are code whose neighbours were not trained on:
in the order of the SHA-256 of their names, test takes each one that still fits into its 5 % of the bytes, then val, and train has the rest.
Within a split, files follow each other in the order of their paths.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from lab.config import ConfigError
from lab.tasks.corpus import Corpus
from lab.tasks.prepared import Content

SHARE = 0.05  # of test, and of val
NOT_EVERYWHERE = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "tkinter", "turtle.py", "turtledemo", "lib2to3")
    + ("distutils", "ensurepip", "sitecustomize.py", "usercustomize.py", "__pycache__")
)
OF_THE_BUILD = ("_sysconfigdata", "config-", "_distutils_system_mod")  # how such names begin


class StandardLibrary(Corpus):
    """source: another folder of Python files; None: the standard library."""

    name = "stdlib"

    def __init__(
        self,
        vocab_size: int = 256,
        seq_len: int = 256,
        source: str | None = None,
        val_bytes: int | None = 65536,
        eval_stride: int | None = None,
        eval_lengths: Sequence[int] = (1,),
        carry_state: bool = False,
    ) -> None:
        if vocab_size != 256:
            raise ValueError(f"task.vocab_size must be 256, the tokens are bytes; got {vocab_size}")
        super().__init__(vocab_size, seq_len, val_bytes, eval_stride, eval_lengths, carry_state)
        self.source = Path(source or sysconfig.get_path("stdlib")).expanduser()

    @cached_property
    def files(self) -> list[Path]:
        """Relative paths, sorted as texts, not by the rules of this system."""
        found = []
        for folder, inner, names in os.walk(self.source):
            inner[:] = filter(_is_everywhere, inner)
            found += [Path(folder, name).relative_to(self.source) for name in names if name.endswith(".py") and _is_everywhere(name)]
        return sorted(found, key=Path.as_posix)

    def keys(self) -> list[Callable[[], str]]:
        return [self.dates]

    def dates(self) -> str:
        dates = [(file.as_posix(), (stat := (self.source / file).stat()).st_size, stat.st_mtime_ns) for file in self.files]
        return f"{platform.python_version()}\n{self.source}\n{dates}"

    def read(self) -> Content:
        if not self.files:
            raise ConfigError(f"task.source: {self.source} has no Python source files")
        content = {file: (self.source / file).read_bytes() for file in self.files}
        members = defaultdict(list)
        for file in self.files:
            members[file.parts[0]].append(file)
        split_of = _share_out({module: sum(len(content[file]) for file in files) for module, files in members.items()})
        splits: dict[str, list[bytes]] = {"train": [], "val": [], "test": []}
        for file in self.files:
            splits[split_of[file.parts[0]]].append(content[file])
        return Content(splits, {"python": platform.python_version(), "files": len(self.files)})


def _is_everywhere(name: str) -> bool:
    return name not in NOT_EVERYWHERE and not name.startswith(OF_THE_BUILD)


def _share_out(sizes: dict[str, int]) -> dict[str, str]:
    """The split of each module, from their sizes in bytes."""
    limit = SHARE * sum(sizes.values())
    room = {"test": limit, "val": limit}
    split_of = {}
    for module in sorted(sizes, key=lambda module: hashlib.sha256(module.encode()).digest()):
        split_of[module] = next((split for split in room if sizes[module] <= room[split]), "train")
        if split_of[module] in room:
            room[split_of[module]] -= sizes[module]
    return split_of
