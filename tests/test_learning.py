"""The quickstart's experiments learn what they claim to, as they stand, without a shrunk size. Minutes: run by scripts/test --slow."""

from __future__ import annotations

import pytest

from lab.config import compose
from lab.training import evaluate_run, train


@pytest.mark.slow
@pytest.mark.parametrize("seed", [42, 1])
@pytest.mark.parametrize("name", ["copy_reverse_small", "copy_reverse_small_vanilla"])
def test_copy_reverse_small_is_learnt(tmp_path, monkeypatch, name, seed):
    monkeypatch.chdir(tmp_path)
    train(compose([f"experiment={name}", f"seed={seed}", "run_dir=run"]))
    metrics = evaluate_run("run", [], [])[0]["metrics"]
    assert metrics["exact_match"] >= 0.99 and metrics["exact_match_free"] >= 0.99
