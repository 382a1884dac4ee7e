"""lab-report: one table of runs that are done, running, broken, or no runs at all."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lab.analysis.render import _rich
from lab.analysis.report import best_validation, by_run, by_seed, rows
from lab.cli import report as lab_report
from lab.training.run import Run


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(
    path, *, model="lot", seed=1, val=(0.5, 0.4), exact=None, status="done", reason=None, code="aaaa", config=None, choices=None, **more
):
    """A run folder as training and lab-eval leave it."""
    folder = Path(path)
    folder.mkdir(parents=True)
    stored = {"seed": seed, "model": {"_target_": f"lab.{model}", "d_model": 8}, "task": {"seq_len": 16}, "run_dir": str(path)}
    stored |= {"trainer": {"max_steps": 20}, "optimizer": {}}
    stored |= config or {}
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    chosen = {"model": model, "task": "copy", "experiment": "none", **(choices or {})}
    hparams = {"choices": chosen, "code_version": code, "git_commit": None, "created": more.get("created", "")}
    (folder / "hparams.yaml").write_text(yaml.safe_dump(hparams))
    (folder / "job.json").write_text(json.dumps({"status": status, "reason": reason, "step": 20}))
    lines = [{"step": 1, "train/ce_loss": 9.0}, *({"step": 10 * (i + 1), "val/ce_loss": value} for i, value in enumerate(val))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if status == "done":
        document = {"params": 12345, "split": "val", "code_version": more.get("last_code", code), "data": more.get("data", {})}
        (folder / "metrics.json").write_text(json.dumps(document))
    if exact is not None:
        (folder / "eval").mkdir()
        scores = {"step": 20, "metrics": {"exact_match": exact, "sync": None}, "references": {"uniform": more.get("uniform", 4.0)}}
        scores |= {"published": {"S4": {"value": 0.25, "source": "arXiv:2111.00396"}, "torn": 1}}
        scores |= {"data": more["data"]} if "data" in more else {}
        (folder / "eval" / "test-best.json").write_text(json.dumps(scores))
    return folder


def table(*targets):
    return by_run(rows(map(str, targets)))


def test_a_line_for_each_run_with_what_differs():
    make("runs/a/1", seed=1, exact=0.9)
    make("runs/a/2", seed=2, val=(0.3, 0.6), exact=0.8, config={"optimizer": {"lr": 1e-3}})
    make(
        "runs/b/1",
        seed=1,
        val=(0.7,),
        model="vanilla",
        status="interrupted",
        reason="stopped by SIGTERM",
        config={"optimizer": {"lr": 2e-3}},
    )
    report = table("runs")
    assert report.columns == [
        "run", "model", "task", "optimizer.lr", "seed", "status", "step", "params", "best", "val ce_loss", "test exact_match", "reason",
    ]  # fmt: skip
    first, second, third = report.rows
    assert first == {
        "run": "runs/a/1", "model": "lot", "task": "copy", "optimizer.lr": None, "seed": 1, "status": "done", "step": 20, "params": 12345,
        "best": "", "val ce_loss": 0.4, "test exact_match": 0.9, "reason": None,
    }  # fmt: skip
    assert (second["best"], second["val ce_loss"], second["optimizer.lr"]) == ("*", 0.3, 1e-3)  # the better test score is not chosen
    assert (third["status"], third["reason"], third["params"], third["test exact_match"]) == (
        "interrupted",
        "stopped by SIGTERM",
        None,
        None,
    )
    assert "test scores took no part" in report.notes[0] and "references of copy: uniform 4" in report.notes
    assert "published for copy: S4 0.25 (arXiv:2111.00396)" in report.notes
    assert not any("different code" in note for note in report.notes)


def test_only_runs_of_the_same_data_compete():
    make("a", val=(0.5,))
    make("b", val=(0.1,), config={"task": {"seq_len": 4}})
    make("c", val=(0.01,), status="interrupted")
    assert [row["best"] for row in table("a", "b", "c").rows] == ["*", "*", ""]


def test_runs_of_different_bytes_are_told_apart():
    """The bytes of the standard library are not in the config."""
    one, other = ({"sha256": digits * 8, "context": 16, "stride": stride} for digits, stride in (("1a2b3c4d", 16), ("5e6f7a8b", 16)))
    make("a", seed=1, val=(0.5,), exact=0.2, data=one)
    make("b", seed=2, val=(0.1,), exact=0.4, data=other, uniform=5.0)
    make("c", seed=3, status="interrupted", data=one)  # has not said of which data it is
    report = table("a", "b", "c")
    assert [(row["best"], row["data"]) for row in report.rows] == [("*", "1a2b3c4d"), ("*", "5e6f7a8b"), ("", "")]
    assert "test sha256" not in report.columns and "test stride" not in report.columns
    assert [note for note in report.notes if "references" in note] == [
        "references of copy, data 1a2b3c4d: uniform 4", "references of copy, data 5e6f7a8b: uniform 5",
    ]  # fmt: skip
    assert [(row["data"], row["runs"], row["val ce_loss"]) for row in by_seed(rows(["a", "b", "c"])).rows] == [
        ("1a2b3c4d", 2, 0.5), ("5e6f7a8b", 1, 0.1),
    ]  # fmt: skip


def test_scores_taken_in_different_ways_are_told_apart():
    make("a", seed=1, exact=0.2, data={"context": 16, "stride": 16})
    make("b", seed=2, exact=0.4, data={"context": 16, "stride": 8})
    make("c", model="vanilla", exact=0.3)
    assert not any("not averaged" in note for note in by_seed(rows(["a", "c"])).notes)
    assert [row["test stride"] for row in table("a", "b", "c").rows] == [16, 8, None] and "test context" not in table("a", "b").columns
    report = by_seed(rows(["a", "b", "c"]))
    assert [(row["test stride"], row["test exact_match"]) for row in report.rows] == [("16, 8", None), ("", 0.3)]
    assert "not averaged" in report.notes[-1]


def test_what_follows_from_the_model_is_no_column():
    make("a", choices={"mixer@model.mixer": "lattice"})
    make("b", model="vanilla", choices={"mixer@model.mixer": "attention"}, config={"loss_weights": {"sync": 1}})
    assert not {"mixer@model.mixer", "model._target_", "loss_weights.sync"} & set(table("a", "b").columns)
    make("c", choices={"mixer@model.mixer": "attention"})
    assert [row["mixer@model.mixer"] for row in table("a", "c").rows] == ["lattice", "attention"]


def test_another_code_version_is_marked():
    make("a"), make("b"), make("c", code="bbbb", seed=2), make("d", code="aaaa", last_code="bbbb")
    report = table("a", "b", "c")
    assert [row["code"] for row in report.rows] == ["aaaa", "aaaa", "bbbb"]
    assert "the runs are of different code: aaaa (2); bbbb (1)" in report.notes
    assert by_seed(rows(["a", "c"])).rows[0]["code"] == "several versions"
    assert [row["code"] for row in table("a", "d").rows] == ["aaaa", "aaaa, bbbb"]  # d went on with other code
    assert by_seed(rows(["d"])).rows[0]["code"] == "several versions"


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("metrics.json", "{", "metrics.json is not valid JSON"),
        ("metrics.json", "[]", "metrics.json is not as lab writes it"),
        ("eval/test-best.json", '{"metrics": 3}', "not as lab writes it"),
        ("job.json", "{}", "job.json is not that of a run of lab: it lacks status"),
        ("job.json", "half", "job.json is not valid JSON"),
        ("hparams.yaml", "a: [", "hparams.yaml is not valid YAML"),
        ("hparams.yaml", "3", "hparams.yaml is not that of a run of lab"),
        ("config.yaml", "\t", "config.yaml is not valid YAML"),
        ("metrics.jsonl", b"\xff\xfe", "can't decode"),
    ],
)
def test_a_broken_file_is_a_reason(file, content, reason):
    folder = make("a", exact=0.5)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    make("b", exact=0.5)
    broken, whole = table("a", "b").rows
    assert reason in broken["reason"] and whole["reason"] is None
    by_seed(rows(["a", "b"]))


def test_what_is_no_run_is_a_line_too(capsys):
    make("a")
    Path("empty").mkdir()
    Path("file.txt").write_text("x")
    (Path("half") / "checkpoints").mkdir(parents=True)
    assert [(row["run"], row["status"], row["reason"]) for row in table("a", "empty", "file.txt", "half").rows] == [
        ("a", "done", None), ("empty", "no run", "there is no run in this folder"), ("file.txt", "no run", "not a folder"),
        ("half", "no run", "there is no run in this folder"),
    ]  # fmt: skip
    assert lab_report.main(["runz"]) == 1
    assert capsys.readouterr().err == "lab-report: runz: there is no such run, sweep or folder\n"


def test_a_running_job_and_one_that_was_killed():
    make("a", status="running")
    make("b", status="running")
    with Run("a").writer():
        alive, killed = table("a", "b").rows
    assert (alive["status"], killed["status"]) == ("running", "interrupted") and "ended without a word" in killed["reason"]


def test_a_sweep_is_its_jobs_each_run_once(monkeypatch):
    here = Path.cwd().resolve()
    make("runs/x/1"), make("runs/x/2"), make("runs/y/3", exact=0.1)
    jobs = [("runs/x/2", None), ("runs/x/9", "optimizer: lr is odd"), ("runs/x/10", None), ("runs/y/3", "trained, but not evaluated: x")]
    described = [{"folder": folder, "reason": reason, "words": [f"seed={i}", "run_dir=a b"]} for i, (folder, reason) in enumerate(jobs)]
    sweep = Path("runs/sweeps/abc")
    sweep.mkdir(parents=True)
    (sweep / "sweep.json").write_text(json.dumps({"jobs": described}))
    (sweep / "table.json").write_text("{}")
    want = [
        ("runs/x/2", "done", None), ("runs/x/9", "failed", "optimizer: lr is odd"), ("runs/x/10", "not begun", None),
        ("runs/y/3", "done", None),  # evaluated since
    ]  # fmt: skip
    words = [None, "seed=1 'run_dir=a b'", "seed=2 'run_dir=a b'", None]  # where no config says what the job is
    for target in ("runs/sweeps/abc", "runs/sweeps/abc/sweep.json", "runs/sweeps/abc/table.json", "runs/sweeps/*", "runs/sweeps"):
        report = by_run(rows([target])).rows
        assert [(row["run"], row["status"], row["reason"]) for row in report] == [(*job,) for job in want]
        assert [row["words"] for row in report] == words
    assert [row.get("words") for row in by_seed(rows(["runs/sweeps"])).rows] == words[:3]  # 2 and 3 are of one experiment
    all_of_it = [row.path.as_posix() for row in rows(["runs/x/*", "runs/x/1", "runs"])]
    assert all_of_it == ["runs/x/1", "runs/x/2", "runs/x/9", "runs/x/10", "runs/y/3"]

    Path("linked").symlink_to("runs/sweeps/abc")
    for place, target in (("..", f"{here.name}/runs/sweeps/abc"), ("runs/sweeps/abc", "."), (".", "linked")):
        monkeypatch.chdir(here / place)  # sweep.json says the folders from where the sweep was started
        assert [(row.path.resolve(), row.status) for row in rows([target])] == [(here / job, status) for job, status, _ in want]
    monkeypatch.chdir(here)
    (sweep / "sweep.json").write_text("{}")
    assert "sweep.json is not as lab writes it" in rows([str(sweep)])[0].reason


def test_by_seed():
    for seed, val, exact in ((1, 0.5, 0.7), (2, 0.3, 0.9), (3, 0.1, 0.2)):
        make(f"lot/{seed}", seed=seed, val=(val,), exact=exact, status="done" if seed < 3 else "failed")
        make(f"big/{seed}", seed=seed, val=(val / 2,), config={"model": {"d_model": 16}})
    make("one", seed=1, val=(0.9,), model="vanilla")
    report = by_seed(rows(["lot", "big", "one"]))
    lot, big, one = report.rows
    assert (lot["model.d_model"], lot["runs"], lot["n"], lot["seeds"], lot["best"]) == (8, 3, 2, "1, 2", "")
    assert lot["val ce_loss"] == pytest.approx(0.4) and lot["val ce_loss sd"] == pytest.approx(0.02**0.5)  # divided by n - 1
    assert lot["test exact_match"] == pytest.approx(0.8) and big["test exact_match"] is None
    assert (big["n"], big["best"], big["val ce_loss"]) == (3, "*", pytest.approx(0.15))
    assert (one["n"], one["val ce_loss"], one["val ce_loss sd"]) == (1, 0.9, None)
    assert any("sample standard deviation" in note for note in report.notes)


def test_each_seed_counts_once_and_a_mean_says_over_how_many():
    make("old", seed=1, val=(0.5,), created="2026-11-21"), make("new", seed=1, val=(0.3,), exact=0.5, created="2026-11-22")
    make("newest", seed=1, val=(0.1,), status="interrupted", created="2026-11-23"), make("two", seed=2, val=(0.1,))
    report = by_seed(rows(["old", "new", "newest", "two"]))
    (row,) = report.rows
    assert (row["runs"], row["n"], row["seeds"], row["test n"]) == (2, 2, "1, 2", 1) and row["val ce_loss"] == pytest.approx(0.2)
    assert "test n: those of them that are evaluated" in report.notes
    assert report.notes[-1] == "left out: 2 of the same experiment and seed in another folder; the newest one counts"
    report = by_seed(rows(["new"]))
    assert "test n" not in report.columns and not any("left out" in note for note in report.notes)


def test_the_best_validation_is_the_first_of_the_lowest():
    folder = make("a", val=(0.5, float("nan"), 0.2, 0.2))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "val/ce_loss": null}\n{"step": 60, "val/ce_loss": 0.1')  # cut off by a kill
    assert best_validation(folder) == {"step": 30, "val/ce_loss": 0.2}


def test_the_best_validation_is_chosen_by_all_digits(tmp_path):
    """As lab-report reads it from metrics.jsonl: two losses may be one float32."""
    import torch

    from lab.training.callbacks import Checkpoints

    checkpoints, losses = Checkpoints(Run(tmp_path), every=100), (0.5, 0.5 - 1e-12, 0.5 - 1e-12)
    assert len(set(map(float, torch.tensor(losses)))) == 1
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(losses, 1):
            metrics = {"val/ce_loss": loss}
            rounded = {name: torch.tensor(value) for name, value in metrics.items()}
            trainer = SimpleNamespace(
                callback_metrics=rounded, global_step=step, max_steps=9, is_global_zero=False, save_checkpoint=lambda path: None
            )
            checkpoints.on_validation_end(trainer, SimpleNamespace(validation=metrics, tables={}, stop_signal=0))
            file.write(json.dumps({"step": step, **metrics}) + "\n")
    assert checkpoints.best["step"] == best_validation(tmp_path)["step"] == 2


def test_formats(capsys):
    make("a", seed=1, exact=0.25), make("b|c", seed=2, exact=0.75)
    assert lab_report.main(["a", "b|c", "--format", "csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(line["run"], line["test exact_match"], line["val ce_loss"]) for line in lines] == [
        ("a", "0.25", "0.4"),
        ("b|c", "0.75", "0.4"),
    ]
    assert lab_report.main(["a", "b|c", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == table("a", "b|c").rows
    assert lab_report.main(["a", "b|c", "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("| run | model |") and "| b\\|c | lot |" in text and "- * marks" in text
    assert lab_report.main(["a", "b|c", "--by-seed"]) == 0
    text = capsys.readouterr().out
    assert "0.5 ± 0.35" in text and "1, 2" in text and "sample standard deviation" in text
    assert lab_report.main(["a", "b|c"]) == 0
    assert capsys.readouterr().out.startswith("model lot, task copy, status done, step 20, params 12,345")


def test_what_was_configured_is_not_rounded(capsys):
    make("a", seed=123456, config={"optimizer": {"lr": 0.0012345}}), make("b", seed=123457, config={"optimizer": {"lr": 0.0012346}})
    assert lab_report.main(["a", "b"]) == 0
    text = capsys.readouterr().out
    assert "123456" in text and "0.0012345" in text and "0.0012346" in text and "params 12,345" in text


def test_output(capsys):
    make("a")
    for name, start in {"t.md": "| run", "t.csv": "run,model", "t.json": "{", "t.txt": "model lot"}.items():
        assert lab_report.main(["a", "--output", name]) == 0
        assert Path(name).read_text().startswith(start) and capsys.readouterr().out == f"written to {name}\n"
    assert lab_report.main(["a", "--output", "t.html"]) == 2
    assert "t.html: the ending says no format" in capsys.readouterr().err
    assert lab_report.main(["a", "--output", "t.html", "--format", "csv"]) == 0
    assert Path("t.html").read_text() == Path("t.csv").read_text()


def test_nothing_heavy_is_imported():
    make("a")
    program = "import sys\nfrom lab.cli.report import main\nassert main(['a']) == 0\nprint({'torch', 'pandas', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.endswith("set()\n"), done.stderr


def test_a_table_wider_than_the_terminal_has_the_runs_as_columns():
    for seed in range(5):
        make(f"runs/a_rather_long_name/{seed}", seed=seed, exact=0.5, config={"optimizer": {"lr": 10.0**-seed}})
    text = _rich(table("runs"), 80)
    lines = text.splitlines()
    assert max(map(len, lines[:-3])) <= 80 and all(f"runs/a_rather_long_name/{seed}" in text for seed in range(5))
    assert sum("optimizer.lr" in line for line in lines) == 3  # two runs side by side, then two, then one
