"""logger=...: tensorboard, csv, wandb, none. metrics.jsonl is written beside each of them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from conftest import rows

from lab.config import ConfigError
from lab.files import by_step
from lab.training import Run, resume
from lab.training.loggers import CsvTable, JsonLines


def table(run):
    with (Path(run) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same_values(run):
    """metrics.csv says what metrics.jsonl says."""
    merged = by_step(rows(run))
    read = {int(row.pop("step")): {name: float(value) for name, value in row.items() if value != ""} for row in table(run)}
    return read == {step: {name: value for name, value in row.items() if value is not None} for step, row in merged.items()}


def test_csv_has_a_row_for_each_step(tiny):
    run = tiny("logger=csv")
    assert [int(row["step"]) for row in table("run")] == list(range(1, 13)) and same_values("run")
    assert table("run")[0]["val/ce_loss"] == "" and not list(run.path.glob("events*"))
    before = (run.path / "metrics.csv").read_text()
    resume("run", ["trainer.max_steps=14"], trust=[])
    assert (run.path / "metrics.csv").read_text().startswith(before) and len(table("run")) == 14


def test_csv_of_a_broken_run_has_no_row_twice(tiny, breaker):
    with pytest.raises(RuntimeError, match="step 8"):
        tiny("logger=csv", *breaker(8))
    assert len(table("run")) == 8
    tiny("logger=csv", *breaker(8))
    assert [int(row["step"]) for row in table("run")] == list(range(1, 13)) and same_values("run")


def test_csv_keeps_up_with_new_columns_and_later_values_of_a_step(tmp_path):
    rows_, csv_ = JsonLines(tmp_path), CsvTable(tmp_path)
    for step, metrics in [(1, {"a": 1.0}), (2, {"a": 2.0}), (2, {"b": 3.0}), (3, {"b": float("nan")}), (4, {"a": 4.0})]:
        for logger in (rows_, csv_):
            logger.log_metrics(metrics, step)
    assert (tmp_path / "metrics.csv").read_text() == "step,a,b\n1,1.0,\n2,2.0,3.0\n3,,\n4,4.0,\n"


def test_none_leaves_metrics_jsonl_alone(tiny):
    run = tiny("logger=none", "trainer.max_steps=2")
    assert not list(run.path.glob("events*")) and [row["step"] for row in rows("run")] == [1, 2, 2]


def test_the_logger_is_not_part_of_the_experiment(tiny):
    hashes = {tiny(f"logger={name}", "trainer.max_steps=1", run_dir=name).hparams()["config_hash"] for name in ("none", "csv")}
    assert len(hashes) == 1


def test_wandb_offline(tiny, monkeypatch):
    """Two trainings in one process are two runs of W&B, with the config and what was logged, and pictures."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = ("logger=wandb", "logger.project=test", "+callbacks.phases._target_=lab.training.Phases", "trainer.max_steps=2")
    for name in ("one", "two"):
        tiny(*words, run_dir=name)
        assert wandb.run is None
        (file,) = Path(name).glob("wandb/offline-run-*/*.wandb")
        content = file.read_bytes()
        assert b"train/ce_loss" in content and b"val/exact_match" in content and b"vocab_size" in content and name.encode() in content
        assert list(Path(name).glob("wandb/offline-run-*/files/media/images/watch_phases/delimiter_wave*.png"))
    tiny(*words, "fresh=true", run_dir="one")
    assert len(list(Path("one").glob("wandb/offline-run-*"))) == 1


def test_wandb_without_a_key_or_the_package_is_one_sentence(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="logger=wandb finds no key: `wandb login` stores one, and WANDB_MODE=offline works without"):
        tiny("logger=wandb")
    monkeypatch.setattr("lab.training.loggers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logger=wandb needs the package wandb, which is not installed: pip install wandb"):
        tiny("logger=wandb")
    assert not Run("run").path.exists()
