"""The comparison that tests/test_comparison_files.py reads and tests/test_compare.py runs, as tiny.yaml in an empty folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.cli import compare as lab_compare

FILE = """\
# @package _global_
defaults: [copy_reverse_small]
models:
  attention: [model=transformer, model.max_len=16]
  mamba:
seeds: 2
expect:
  - {claim: it learns, metric: test/exact_match, model: mamba, scale: 2, at_least: 0.9, source: a book}
  - {metric: test/exact_match, model: mamba, over: attention, at_least: 0.1, source: a book}
task: {seq_len: 16, eval_lengths: [1, 2]}
model: {d_model: 32, n_layers: 1}
"""


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(FILE)
    return Path("tiny.yaml")


def run(*words: str) -> int:
    return lab_compare.main(list(words))
