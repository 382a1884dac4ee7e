"""hydra/launcher=lab: the pool of processes as a launcher of Hydra, which takes none from outside of a `hydra_plugins` package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from lab.config import ConfigError
from lab.config.overrides import SHELL

if TYPE_CHECKING:
    from lab.sweeps.multirun import Sweep


class LabLauncher(Launcher):
    """n_jobs: how many processes at a time."""

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        if not isinstance(self.n_jobs, int) or self.n_jobs < 1:
            raise ConfigError(f"hydra.launcher.n_jobs ({SHELL}): expected an integer of at least 1, got {self.n_jobs}")
        self.sweep: Sweep = task_function  # type: ignore[assignment]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """A job that failed returns NaN: an exception would keep a sweeper of several batches from going on."""
        scores = self.sweep.run(job_overrides, self.n_jobs)
        return [_returned(list(own), score) for own, score in zip(job_overrides, scores, strict=True)]


def _returned(own: list[str], score: float) -> JobReturn:
    returned = JobReturn(overrides=own, status=JobStatus.COMPLETED)
    returned.return_value = score
    return returned


NODE = {"_target_": "hydra_plugins.lab_launcher.LabLauncher", "n_jobs": 1}
ConfigStore.instance().store(group="hydra/launcher", name="lab", node=NODE, provider="lab")
