"""`lab.train`: lab-train from Python, a notebook included. The process is left as it was found."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lab.config import ConfigError, check, compose
from lab.config.overrides import quote
from lab.training.run import Run


def train(
    experiment: str | None = None, overrides: Sequence[str] = (), config: str | Path | None = None, run_dir: str | Path | None = None
) -> Run:
    """Trains and returns the run: `run.metrics`, `run.history()`, `run.model()`.

    experiment: a name out of experiments/, or config: a YAML file of one that lies anywhere. overrides: words as of the command line,
    ["optimizer.lr=1e-3", "model=transformer"]. run_dir: the run's folder, by the rule of lab-train: an unfinished run of the same config
    is continued, a finished one returned as it is. Raises ConfigError or RunError with one sentence. Ctrl-C, or a notebook's stop
    button, finishes the step, saves, and raises Interrupted, a RunError.

    Random states, forced ops, torch's switches, signal handlers and environment variables are put back at the end.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides={overrides!r} must be a list of words, such as ['optimizer.lr=1e-3', 'seed=1']")
    if experiment is not None and config is not None:
        raise ConfigError(f"experiment={experiment} and config={config}: an experiment is given by its name or by its file, not both")
    words = [f"--config={config}"] if config is not None else []
    words += [f"experiment={experiment}"] if experiment is not None else []
    words += [*overrides, *([f"run_dir={quote(str(run_dir))}"] if run_dir is not None else [])]
    composed = compose(words)
    if composed.config["resume"] is not None:
        raise ConfigError("resume= is of the command lab-train; here, run_dir=RUN continues a run of the same config")
    check(composed)
    if composed.config["trainer"]["devices"] != 1:
        raise ConfigError("trainer.devices: from Python a training has one device; the command lab-train starts the processes of several")
    from lab.training import start

    with _process_kept():
        return start.train(composed)


@contextmanager
def _process_kept() -> Iterator[None]:
    import torch

    from lab import ops
    from lab.training.checkpoint import keep_random_states

    environment = dict(os.environ)
    switches = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, benchmark = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark  # type: ignore[attr-defined]
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
    try:
        with keep_random_states(), ops.use():
            yield
    finally:
        torch.use_deterministic_algorithms(switches[0], warn_only=switches[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = benchmark
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
