"""The README does what it says: its files are written, its programs and commands run, in order, in one folder outside the checkout."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
SHORT = (
    "trainer.max_steps=2", "trainer.val_every=2", "task.n_val=8", "task.n_test=8", "task.n_train=128", "trainer.batch_size=8",
    "model.d_model=16", "task.seq_len=8",
)  # fmt: skip


def short(words: list[str]) -> list[str]:
    """A command with the sizes that let it end in a moment; those of the words themselves that are longer are cut."""
    if words[0] != "lab-train" or {"--help", "--cfg", "--explain"} & set(words):
        return words
    if any(word.startswith("resume=") for word in words):
        return [*(word for word in words if not word.startswith("trainer.max_steps")), "trainer.max_steps=4"]
    own_task = any(word.startswith("task=") for word in words)
    return [*words, *(word for word in SHORT if not (own_task and word.startswith("task.")))]


def write_files(folder: Path) -> list[str]:
    """Blocks with the name of a file at their top are written to it; the names."""
    names = []
    for _, text in BLOCKS:
        name = re.match(r"(?:# @package.*\n)?# (\S+\.(?:py|yaml))\n", text)
        if name:
            (folder / name[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / name[1]).write_text(text)
            names.append(name[1])
    return names


def test_the_commands_run_in_order(tmp_path, command, monkeypatch):
    assert {"leaky.py", "majority.py", "decay.py", "squares.py", "configs/model/leaky.yaml", "configs/task/majority.yaml"} == set(
        write_files(tmp_path)
    )
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "copy_reverse_small.yaml").write_text((ROOT / "experiments" / "copy_reverse_small.yaml").read_text())
    assert len(COMMANDS) >= 15
    for line in COMMANDS:
        words = short(shlex.split(line, comments=True))
        done = command(*words, cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


@pytest.mark.parametrize("index", range(sum(kind == "python" for kind, _ in BLOCKS)))
def test_the_programs_run(index, tiny, tmp_path, monkeypatch, capsys):
    write_files(tmp_path)
    tiny("trainer.max_steps=2", run_dir="runs/quickstart")  # also makes the folder the current one
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    program = [text for kind, text in BLOCKS if kind == "python"][index]
    capsys.readouterr()
    exec(compile(program, f"README python block {index + 1}", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    if "exact match, decoded greedily" in program:
        assert float(printed.split()[-1]) > 0.5  # it learns, in 300 steps
    assert ("print(" in program) == bool(printed)


def test_the_mistake_is_quoted_as_it_is_printed(command):
    line, sentence = re.search(r"^\$ (lab-train .*)\n(lab-train: .*)$", README, re.MULTILINE).groups()
    done = command(*shlex.split(line))
    assert done.returncode == 2 and done.stderr.strip() == sentence


@pytest.mark.parametrize("name", ["quickstart", "test"])
def test_the_two_scripts_are_there(name):
    script = ROOT / "scripts" / name
    assert f"./scripts/{name}" in README and script.stat().st_mode & 0o111
    assert "./scripts/test" in (ROOT / ".ci" / "run").read_text()


def test_every_model_and_task_is_in_the_table():
    for group in ("model", "task"):
        for file in (ROOT / "configs" / group).glob("*.yaml"):
            assert f"| `{file.stem}` |" in README, f"{group}={file.stem} is not in the README"
