"""The words of a sweep: the jobs that they name, and the mistakes that are told before a job starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.cli import train as lab_train
from lab.config import compose
from lab.config.files import home
from lab.sweeps import job as job_module
from lab.sweeps import pool
from lab.training.run import job_path


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """The jobs that a sweep would run."""
    monkeypatch.chdir(tmp_path)
    found = []
    monkeypatch.setattr(pool.Pool, "run", lambda self, jobs: found.extend(jobs))
    return found


@pytest.mark.parametrize(
    ("words", "own"),
    [
        (
            ["seed=1,2", "model=lot,transformer"],
            [["seed=1", "model=lot"], ["seed=1", "model=transformer"], ["seed=2", "model=lot"], ["seed=2", "model=transformer"]],
        ),
        (["++seed=range(1,3)"], [["++seed=1"], ["++seed=2"]]),
        (["model.mixer.phase_mode=choice(wave,gain)"], [["model.mixer.phase_mode=wave"], ["model.mixer.phase_mode=gain"]]),
        (["model=transformer", "mixer@model.mixer=attention,lattice"], [["mixer@model.mixer=attention"], ["mixer@model.mixer=lattice"]]),
        (["optimizer.betas=[0.9,0.95],[0.9,0.99]", "~logger"], [["optimizer.betas=[0.9,0.95]"], ["optimizer.betas=[0.9,0.99]"]]),
        (["experiment=glob(copy_reverse*vanilla)"], [["experiment=copy_reverse_small_vanilla"], ["experiment=copy_reverse_vanilla"]]),
        (["seed=1,1"], [["seed=1"]]),
        (["seed=3"], [[]]),
    ],
)  # fmt: skip
def test_the_grammar_is_hydras(jobs, words, own):
    assert lab_train.main(["-m", *words]) == 0
    assert [job.own for job in jobs] == own
    fixed = [word for word in words if not any(word.partition("=")[0] == one.partition("=")[0] for one in own[0])]
    for job in jobs:
        command = job.next_command()
        assert command == ["lab.cli.train", *fixed, *job.own, f"run_dir={job.path}"]
        assert job.composed.stored == compose([*fixed, *job.own]).stored and job_path(compose(command[1:])) == job.path


def test_every_experiment_but_none(jobs):
    assert lab_train.main(["-m", "experiment=glob(*)"]) == 0
    assert sorted(job.own[0].removeprefix("experiment=") for job in jobs) == sorted(
        file.relative_to(home() / "experiments").with_suffix("").as_posix()
        for file in (home() / "experiments").rglob("*.yaml")
        if file.stem != "none"
    )


def test_an_experiment_by_its_file(jobs, tmp_path):
    (tmp_path / "mine.yaml").write_text("trainer: {max_steps: 5}")
    assert lab_train.main(["--config", "mine.yaml", "-m", "seed=1,2"]) == 0
    assert [job.path.parent for job in jobs] == [Path("runs/mine")] * 2 and jobs[0].path != jobs[1].path
    assert jobs[1].next_command()[1:3] == ["--config=mine.yaml", "seed=2"]


def test_classes_of_the_users_are_trusted_in_the_evaluation(jobs, tmp_path):
    (tmp_path / "sweptmixer.py").write_text("from lab.mixers import Attention\nclass Mixer(Attention): ...")
    assert lab_train.main(["-m", "model=transformer", "model.mixer._target_=sweptmixer.Mixer"]) == 0
    assert jobs[0].next_command(after=job_module.TRAIN) == ["lab.cli.eval", str(jobs[0].path), "--trust=sweptmixer.Mixer"]


def test_a_task_without_a_test_split_is_not_evaluated(jobs, tmp_path):
    (tmp_path / "sweptdata.py").write_text("class Data: ...")
    nodes = [f"+task.{split}._target_=sweptdata.Data" for split in ("train", "val")]
    assert lab_train.main(["-m", "task=dataset", "task.vocab_size=8", "task.seq_len=4", *nodes]) == 0
    assert jobs[0].next_command(after=job_module.TRAIN) is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=lot,transfomer"], "model=transfomer (command line): there is no such option; did you mean transformer?"),
        (["seed=1,2", "model.n_layr=3"], "did you mean model.n_layers?"),
        (["model.n_layr=1,2"], "did you mean model.n_layers?"),
        (["seed=1,b"], "seed (command line): expected an int, got 'b'"),
        (["experiment=glop(*)"], "cannot read the value glop(*)"),
        (["experiment=glob(zz*)"], "experiment=glob(zz*) (command line): these values give no job"),
        (["optimizer.lr=interval(0,1)"], "BasicSweeper does not support sweep type"),
        (["seed=1,2", "hydra.launcher.njobs=2"], "did you mean hydra.launcher.n_jobs?"),
        (["seed=1,2", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs (command line): expected an integer of at least 1, got 0"),
        (["hydra/launcher=none_such"], "Available options in 'hydra/launcher': basic lab"),
        (["seed=1,2", "callbacks.phases.intervall=3"], "callbacks.phases.intervall"),
        (["run_dir=x", "seed=1,2"], "run_dir (command line): not with -m: each job has a folder of its own"),
        (["resume=x", "seed=1,2"], "resume (command line): not with -m: the same sweep again resumes"),
        (["seed=1,2", "--cfg", "job"], "--cfg job shows one config: leave out -m"),
        (["--explain", "seed", "seed=1,2"], "--explain shows one config: leave out -m"),
        (["seed=1,2", "--trust", "x"], "--trust belongs to resume=RUN"),
    ],
)
def test_a_mistake_is_told_before_any_job_starts(jobs, capsys, words, sentence):
    assert lab_train.main(["-m", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lab-train: ") and sentence in err and err.count("\n") == 1
    assert jobs == [] and not list(Path("runs").rglob("*.*"))
