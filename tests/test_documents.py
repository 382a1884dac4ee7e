"""README.md and the pages in docs/ do what they say: the files in them are written, their commands and programs run, in an empty folder.

A block ```bash holds commands, one to a line; ```python, ```yaml or ```cpp a file, if its first line is a comment with a name, else a
program. A block without a language is shown and not run. `<!-- before: COMMAND -->` runs a command first that the reader has run
elsewhere. The trainings of the pages in docs/models/ are composed and checked only, and so are the README's variants of one: each would
take seconds to import torch, and other tests train what they name. So are all comparisons, which are several trainings each; those that
are files of experiments/ are read by tests/test_comparison_files.py.
"""

from __future__ import annotations

import glob
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from test_comparison_files import COMPARISONS

from lab.config import check, compose
from lab.sweeps import comparison_words

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = DOCUMENTS[0].read_text()
SLOW = (
    "doctor.md",
    "export.md",
    "extending.md",
    "kernels.md",
    "language_modelling.md",
    "mixture_of_experts.md",
    "monitoring.md",
    "sweeps.md",
)
READ_ELSEWHERE = {path.relative_to(ROOT).as_posix() for path in COMPARISONS}
SHORT = (
    "trainer.max_steps=2", "trainer.val_every=2", "task.n_val=8", "task.n_test=8", "task.n_train=128", "trainer.batch_size=8",
    "model.d_model=16", "task.seq_len=8",
)  # fmt: skip


class Block(NamedTuple):
    kind: str
    text: str
    file: str | None


def blocks(document: Path) -> list[Block]:
    found = []
    pattern = r"^```(bash|python|yaml|cpp)\n(.*?)^```|^<!-- before: (.*?) -->"
    for kind, text, before in re.findall(pattern, document.read_text(), re.MULTILINE | re.DOTALL):
        name = re.match(r"(?:# @package.*\n)?(?:#|//) (\S+\.(?:py|yaml|cpp))\n", text)
        found.append(Block(kind or "bash", text or before, name[1] if name else None))
    return found


def short(words: list[str]) -> list[str]:
    """A command with the sizes that let it end in a moment; those of the words themselves that are longer are cut."""
    if words[0] != "lab-train" or {"--help", "--cfg", "--explain"} & set(words):
        return words
    if any(word.startswith("resume=") for word in words):
        return [*(word for word in words if not word.startswith("trainer.max_steps")), "trainer.max_steps=4"]
    own_task, own_width = (any(word.startswith(start) for word in words) for start in ("task=", "match."))
    left_out = ("task.",) * own_task + ("model.d_model",) * own_width
    return [*words, *(word for word in SHORT if not word.startswith(left_out))]


def is_variant(words: list[str], document: Path) -> bool:
    """A training of the README with words of its own, and no folder that later commands name."""
    return (
        document == DOCUMENTS[0]
        and len(words) > 2
        and words[1].startswith("experiment=")
        and all("=" in word for word in words[1:])
        and (not any(word.startswith("run_dir=") for word in words))
    )


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "document",
    [pytest.param(path, marks=[pytest.mark.slow] if path.name in SLOW else []) for path in DOCUMENTS],
    ids=lambda path: path.name,
)
def test_a_document_runs(document, tmp_path, monkeypatch, in_process, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    (tmp_path / "experiments").mkdir()
    for file in (ROOT / "experiments").rglob("*.yaml"):  # the README names these files by the path that they have in a checkout
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(file.read_text())
    try:
        for block in blocks(document):
            run(block, tmp_path, in_process, capsys, document)
    finally:
        for name in set(sys.modules) - before:
            if not hasattr(sys.modules[name], "__file__") or str(sys.modules[name].__file__).startswith(str(tmp_path)):
                del sys.modules[name]


def run(block: Block, folder: Path, in_process, capsys, document: Path) -> None:
    if block.file:
        (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
        (folder / block.file).write_text(block.text)
    elif block.kind == "bash":
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "lab-train" and (document.parent.name == "models" or is_variant(words, document)):
                check(compose(words[1:]))
            elif words and words[0] == "lab-compare":
                expanded = [name for word in words[1:] for name in sorted(glob.glob(word)) or [word]]
                given = [word for word in expanded if word not in READ_ELSEWHERE and not word.startswith("--")]
                assert given in ([], ["threads=1"]) or comparison_words.read_all(given), line
            elif words:
                code = in_process(*short(words))
                said = capsys.readouterr()
                assert code == 0, f"{line}\n{said.out}\n{said.err}"
    elif block.kind == "python":
        capsys.readouterr()
        exec(compile(block.text, block.text.splitlines()[0], "exec"), {"__name__": "document"})
        printed = capsys.readouterr().out
        assert ("print(" in block.text) == bool(printed)
        if "exact match, decoded greedily" in block.text:
            assert float(printed.split()[-1]) > 0.5  # it learns, in 300 steps
    else:
        raise AssertionError(f"a block of YAML or C++ without the name of its file:\n{block.text}")


def test_there_is_something_to_run():
    count = {kind: sum(block.kind == kind for document in DOCUMENTS for block in blocks(document)) for kind in ("bash", "python", "yaml")}
    assert count["bash"] >= 5 and count["python"] >= 8 and count["yaml"] >= 3, count


def test_the_mistake_is_quoted_as_it_is_printed(in_process, capsys):
    line, sentence = re.search(r"^\$ (lab-train .*)\n(lab-train: .*)$", README, re.MULTILINE).groups()
    assert in_process(*shlex.split(line)) == 2 and capsys.readouterr().err.strip() == sentence


@pytest.mark.parametrize("name", ["quickstart", "test"])
def test_the_two_scripts_are_there(name):
    script = ROOT / "scripts" / name
    assert f"./scripts/{name}" in README and script.stat().st_mode & 0o111
    assert "./scripts/test" in (ROOT / ".ci" / "run").read_text()


def test_every_model_and_task_is_in_the_table():
    for group in ("model", "task"):
        for file in (ROOT / "configs" / group).glob("*.yaml"):
            row = rf"^\|[^|]+\|[^|]*`{file.stem}`"
            assert re.search(row, README, re.MULTILINE), f"{group}={file.stem} is not in the README"


def test_no_placeholder_is_left():
    for document in DOCUMENTS:
        assert not re.search(r"^[A-Z_]{8,}$|TODO|FIXME", document.read_text(), re.MULTILINE), document


def test_every_page_is_linked():
    for page in DOCUMENTS[1:]:
        name = page.relative_to(ROOT).as_posix()
        assert f"({name})" in README, f"{name} is not in the README"
