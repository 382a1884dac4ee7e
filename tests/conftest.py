"""Shared by the tests: a training small enough for milliseconds, in process or as a command."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from lab.sweeps import warm

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before they are imported: no test asks the Hub

TINY = (
    "model.d_model=16", "model.n_layers=1", "model.mixer.n_heads=2", "model.dropout=0.1", "model.mixer.dropout=0.0",
    "task.vocab_size=12", "task.seq_len=8", "task.n_train=70", "task.n_val=12", "task.n_test=10", "task.free_samples=4",
    "trainer.max_steps=12", "trainer.batch_size=8", "trainer.val_every=6", "trainer.checkpoint_every=5", "trainer.log_every=1",
    "trainer.accelerator=cpu", "optimizer.lr=1e-2", "~callbacks.progress",
    "~callbacks.phases", "~callbacks.attention", "~callbacks.state_spaces", "~callbacks.experts",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda", help="where tests marked gpu run; cpu: the same code without a GPU")


@pytest.fixture(scope="session")
def device(request) -> str:
    """Of tests marked gpu. Without a GPU they are skipped."""
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU here")
    return name


# killer.py of a test's own folder
KILLER = '''
import os, pathlib, signal
import pytorch_lightning as pl

class Killer(pl.Callback):
    """Sends this process a signal at the start of step `step`, once."""
    def __init__(self, step: int, number: int = 9):
        self.step, self.number, self.mark = step, number, pathlib.Path("killed")
    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == self.step and trainer.is_global_zero and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), self.number)
'''


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """A shell starts what it puts into the background with Ctrl-C ignored, and its children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tests run in parallel, one process on each core."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def data_folder(tmp_path_factory):
    """Prepared corpora go here, not into the home of who runs the tests."""
    os.environ["LAB_DATA"] = str(tmp_path_factory.mktemp("lab_data"))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """tiny(*overrides) trains in process, in the folder `run` of an empty current folder, and returns the run."""
    monkeypatch.chdir(tmp_path)
    from lab.config import compose
    from lab.training import train

    def start(*overrides, run_dir="run"):
        return train(compose([*TINY, *overrides, f"run_dir={run_dir}"]))

    return start


@pytest.fixture
def breaker(tmp_path, monkeypatch):
    """breaker(step): the words for a callback that raises an error at the start of that step, once."""
    (tmp_path / "breaker.py").write_text(
        "import pathlib\nimport pytorch_lightning as pl\n"
        "class Breaker(pl.Callback):\n"
        "    def __init__(self, step: int):\n"
        "        self.step, self.mark = step, pathlib.Path('broken')\n"
        "    def on_train_batch_start(self, trainer, module, batch, index):\n"
        "        if trainer.global_step == self.step and not self.mark.exists():\n"
        "            self.mark.touch()\n"
        "            raise RuntimeError(f'broken at step {self.step}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return lambda step: ("+callbacks.breaker._target_=breaker.Breaker", f"+callbacks.breaker.step={step}")


@pytest.fixture
def command(tmp_path):
    """command("lab-train", *words) runs a command in an empty folder, and gives what it did."""

    def call(name, *words, cwd=tmp_path, **kwargs):
        # pytest's own variables (warnings as errors) are not the user's
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")} | {"OMP_NUM_THREADS": "1"}
        module = f"lab.cli.{name.removeprefix('lab-')}"
        return subprocess.run(
            [sys.executable, "-m", module, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, **kwargs
        )

    return call


@pytest.fixture
def in_process(monkeypatch):
    """in_process("lab-train", *words) is `command` without the ten seconds that a process takes to import torch, in the current folder;
    the jobs of a sweep run the same way, one after the other. Printed lines go to capsys."""
    monkeypatch.setattr(warm, "start", _Job)

    def call(name: str, *words: str) -> int:
        main = importlib.import_module(f"lab.cli.{name.removeprefix('lab-')}").main
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # as errors they are for the tests, not for the user
            try:
                return main(list(words))
            except SystemExit as end:  # of argparse
                return int(end.code or 0)

    _Job.call = staticmethod(call)
    return call


class _Job:
    """What the pool of a sweep asks of a process, of one that has ended already."""

    call: Callable[..., int]

    def __init__(self, command: list[str], log: Path, environment: object) -> None:
        self.pid = os.getpid()
        with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
            self.exitcode = self.call(command[0].rpartition(".")[2], *command[1:])


def rows(run_path) -> list[dict]:
    """metrics.jsonl of a run."""
    return [json.loads(line) for line in (Path(run_path) / "metrics.jsonl").read_text().splitlines()]


def tensors(checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its path: weights, averaged weights, optimiser moments, random states."""
    found: dict[str, torch.Tensor] = {}

    def walk(path, value):
        if isinstance(value, torch.Tensor):
            found[path] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{path}/{key}", inner)
        elif isinstance(value, list | tuple):
            for index, inner in enumerate(value):
                walk(f"{path}/{index}", inner)

    walk("", torch.load(checkpoint, weights_only=True))
    return found
