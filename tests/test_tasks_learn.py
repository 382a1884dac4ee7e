"""Each task of the suite is learned better than by any constant answer, by attention, a time-invariant state space and a selective one.

The words are those of docs/tasks.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lab.config import check, compose
from lab.training import evaluate_run, train

PAGE = Path(__file__).parents[1] / "docs" / "tasks.md"
SMALL = {task: words for task, words in re.findall(r"^lab-train task=(\w+) (.*model\.d_model=64 .*)$", PAGE.read_text(), re.MULTILINE)}
BASE = (
    "model.d_model=64", "model.n_layers=2", "model.dropout=0.0", "task.n_val=200", "task.n_test=500", "trainer.val_every=1000",
    "trainer.batch_size=32", "trainer.accelerator=cpu", "run_dir=run", "~callbacks",
)  # fmt: skip


def test_every_task_of_the_suite_has_its_command():
    suite = {path.stem for path in (PAGE.parents[1] / "configs" / "task").glob("*.yaml") if "splits are streams" in path.read_text()}
    assert suite <= set(SMALL)


@pytest.mark.parametrize("task", SMALL)
def test_the_command_of_a_task_is_right(task):
    check(compose(["task=" + task, *shlex.split(SMALL[task])]))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["transformer", "s4d", "mamba"])
@pytest.mark.parametrize("task", SMALL)
def test_a_task_is_learned(task, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word for word in shlex.split(SMALL[task]) if not word.startswith(("model=", "model.d_", "model.n_l", "run_dir"))]
    base = [word for word in BASE if task != "digits" or not word.startswith("task.n_")]
    train(compose([f"task={task}", f"model={model}", *base, *words]))
    result, _ = evaluate_run("run", [], [])
    score = result["metrics"]["accuracy" if "accuracy" in result["metrics"] else "token_accuracy"]
    assert score > max(result["references"].values()) + 0.03
