"""Byte corpora and the standard library: which bytes, in which split, prepared once, and each scored exactly once."""

from __future__ import annotations

import gzip
import json
import math
import os
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from lab.analysis.metrics import Evaluation, TokenScores
from lab.config import ConfigError, compose
from lab.mixers import Attention
from lab.models import Stack, initialise
from lab.tasks import EvalLoader, StandardLibrary, TrainLoader
from lab.tasks.base import IGNORE
from lab.tasks.stdlib import _share_out
from lab.training import Run, RunError, evaluate_run, resume, train


@pytest.fixture
def source(tmp_path):
    """A small library: 40 modules of a few hundred bytes, a package, and what does not belong to it."""
    folder = tmp_path / "source"
    for i in range(40):
        text = "".join(f"def function_{i}_{k}(x):\n    return x + {k * i}  # größer\n" for k in range(10))
        put(folder / f"module_{i:02}.py", text + "end = 1")  # no newline at the end: the one before a split is not a byte of it
    for part in ("__init__", "core", "inner/deep"):
        put(folder / f"package/{part}.py", "import core\n" * 10 + "core")
    for foreign in ("site-packages/numpy/x.py", "test/test_x.py", "package/tests/test_y.py", "_sysconfigdata_linux.py", "config-3.x/y.py"):
        put(folder / foreign, "foreign = 1\n")
    put(folder / "package/data.txt", "foreign\n")
    return folder


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def corpus(source, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_DATA", str(tmp_path / "data"))

    def make(**changes):
        return StandardLibrary(**{"seq_len": 64, "source": str(source), **changes})

    return make


# ----------------------------------------------------------------------- which bytes


def test_each_file_is_in_one_split_whole_and_a_package_stays_together(corpus, source):
    task = corpus()
    splits = {name: task.bytes_of(name).tobytes() for name in ("train", "val", "test")}
    files = sorted(path for path in source.rglob("*.py") if "foreign" not in path.read_text())
    homes = {}
    for file in files:
        (homes[file],) = [name for name, content in splits.items() if file.read_bytes() in content]
    assert sum(map(len, splits.values())) == sum(file.stat().st_size for file in files) == task.facts()["bytes"]
    assert set(homes.values()) == {"train", "val", "test"}
    assert len({home for file, home in homes.items() if "package" in file.parts}) == 1
    for name, content in splits.items():
        assert content == b"".join(file.read_bytes() for file in files if homes[file] == name), "in the order of their paths"
        assert name == "train" or 0.01 < len(content) / task.facts()["bytes"] <= 0.05


def test_a_large_module_is_for_training_and_sizes_alone_do_not_decide():
    sizes = {"large": 1000} | {f"module_{i}": 10 for i in range(100)}
    split_of = _share_out(sizes)
    assert split_of["large"] == "train" and list(split_of.values()).count("test") == list(split_of.values()).count("val") == 10
    assert _share_out(dict(reversed(sizes.items()))) == split_of


def test_the_real_standard_library():
    task = StandardLibrary()
    train, ours = task.bytes_of("train"), {name: task.bytes_of(name).tobytes() for name in ("val", "test")}
    assert len(train) > 5_000_000 and all(len(content) > 0.03 * len(train) for content in ours.values())
    assert b"OrderedDict" in train.tobytes() and not {"test", "idlelib", "site-packages"} & {file.parts[0] for file in task.files}
    assert task.facts()["python"] in task.describe() and task.facts()["sha256"] in task.describe()
    references = task.references("test")
    assert references["gzip_9"] < references["unigram"] < references["uniform"] == 8


# ----------------------------------------------------------------------- prepared once


def test_the_bytes_are_prepared_once(corpus, source, monkeypatch):
    first = corpus().prepared
    with monkeypatch.context() as patch:
        patch.setattr(StandardLibrary, "read", lambda self: pytest.fail("read again"))
        assert corpus().prepared == first
    put(source / "module_00.py", "changed = True\n")
    assert corpus().facts()["sha256"] != first.facts["sha256"]


@pytest.mark.parametrize("harm", ["truncate", "foreign", "no json", "foreign json"])
def test_what_is_damaged_is_made_anew(corpus, capsys, harm):
    file, facts, _ = corpus().prepared
    good = file.read_bytes()
    document = file.with_suffix(".json")
    match harm:
        case "truncate":
            file.write_bytes(good[:-1])
        case "foreign":
            file.write_bytes(b"x" * len(good))
        case "no json":
            document.unlink()
        case "foreign json":
            document.write_text("[1, 2]")
    again = corpus().prepared
    assert (again.file, again.facts, file.read_bytes()) == (file, facts, good)
    assert ("damaged, or of something else" in capsys.readouterr().err) == (harm != "no json")


PREPARE = """
import os, sys, time
from pathlib import Path
from lab.tasks import StandardLibrary
sources, data, me, other = sys.argv[1:]
os.environ["LAB_DATA"] = data
for source in sorted(Path(sources).iterdir()):
    task = StandardLibrary(source=str(source))
    Path(data, f"{source.name}.{me}").touch()
    end = time.monotonic() + 60
    while not Path(data, f"{source.name}.{other}").exists():
        assert time.monotonic() < end, "the other process has failed"
    file, facts, splits = task.prepared
    print(file, facts["sha256"], splits, task.bytes_of("test")[-1])
"""


def test_two_processes_prepare_at_once(tmp_path):
    """For each of several sources both begin when both are ready, and both end with the same whole file."""
    for turn in range(8):
        for i in range(40):
            put(tmp_path / f"sources/{turn}/module_{i:02}.py", f"turn = {turn + i}\n" * 2000)
    data = tmp_path / "data"
    data.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, str(tmp_path / "sources"), str(data), *names],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for names in ("ab", "ba")
    ]  # fmt: skip
    (out, error), other = [process.communicate(timeout=300) for process in processes]
    assert (out, error) == other and error == "" and len(out.splitlines()) == 8
    assert not list(data.glob(".*")) and len(list(data.glob("*.bin"))) == len(list(data.glob("*.json"))) == 8


def test_the_folder_is_lab_data_else_the_cache(corpus, tmp_path, monkeypatch):
    assert corpus().prepared.file.parent == tmp_path / "data"
    monkeypatch.delenv("LAB_DATA")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert corpus().prepared.file.parent == tmp_path / "home/.cache/lab"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vocab_size": 255}, "task.vocab_size must be 256"),
        ({"seq_len": 0}, "task.seq_len must be at least 1"),
        ({"val_bytes": 0}, "task.val_bytes must be at least 1"),
        ({"eval_stride": 65}, "task.eval_stride must be between 1 and task.seq_len 64"),
        ({"eval_lengths": [0]}, "task.eval_lengths"),
    ],
)
def test_impossible_values_say_what_would_be_right(corpus, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        corpus(**changes)


def test_impossible_folders_say_what_would_be_right(corpus, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="stdlib cannot be prepared in .*file.*let LAB_DATA name another"):
        patch.setenv("LAB_DATA", str(tmp_path / "file"))
        _ = corpus().prepared
    with pytest.raises(ConfigError, match="task.source: .*nowhere has no Python source files"):
        _ = corpus(source=str(tmp_path / "nowhere")).prepared
    put(tmp_path / "tiny/a.py", "a = 1\n")
    with pytest.raises(ConfigError, match="one of train, val and test would be without bytes"):
        _ = corpus(source=str(tmp_path / "tiny")).prepared
    with pytest.raises(ConfigError, match="the test split of stdlib has .* bytes, fewer than one input of 65536"):
        corpus(seq_len=65536).split("test")


# ----------------------------------------------------------------------- windows


def scored(split) -> tuple[list[int], list[tuple[int, int]]]:
    """The scored targets in order; how much context each had in its window."""
    batch = split.batch(range(len(split)))
    tokens, context = [], []
    for targets in batch.targets.tolist():
        tokens += [target for target in targets if target != IGNORE]
        context += [place for place, target in enumerate(targets) if target != IGNORE]
    return tokens, context


@pytest.mark.parametrize("name", ["train", "val", "test"])
@pytest.mark.parametrize(("scale", "stride"), [(1, None), (1, 16), (1, 1), (2, None), (2, 48)])
def test_every_byte_is_scored_exactly_once(corpus, name, scale, stride):
    task = corpus(eval_stride=stride)
    split = task.split(name, scale)
    tokens, context = scored(split)
    assert bytes(tokens) == task.bytes_of(name).tobytes()
    stride = 64 if stride is None or name == "train" else stride
    assert min(context[64 * scale :], default=99) >= (64 - stride) * scale
    assert split.facts() == {"scored_bytes": len(tokens), "context": 64 * scale, "stride": stride * scale}


def test_an_input_is_the_byte_before_its_target(corpus):
    split = corpus(eval_stride=24).split("test")
    batch = split.batch(range(len(split)))
    assert batch.inputs.shape == (len(split), 64) and batch.lengths is None
    assert batch.inputs[0, 0] == ord("\n"), "what the first byte is predicted from"
    content = corpus().bytes_of("test").tobytes()
    for row, (inputs, targets) in enumerate(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)):
        end = min(64 + 24 * row, len(content))
        assert bytes(inputs) == (b"\n" + content)[end - 64 : end]
        assert all(target in (IGNORE, content[end - 64 + place]) for place, target in enumerate(targets))
    assert torch.equal(split.batch([3, 1]).inputs, batch.inputs[[3, 1]])


def test_an_epoch_trains_on_every_byte_but_those_of_the_last_window(corpus):
    split = corpus().split("train")
    (window,) = TrainLoader(split, 1, len(split), 1, seed=0)
    seen = sorted(tuple(batch.targets[0].tolist()) for batch in window)
    assert seen == sorted(tuple(row) for row in split.batch(range(len(split))).targets.tolist())


def test_validation_scores_a_part_spread_over_the_split(corpus):
    whole, part = corpus().split("val"), corpus(val_bytes=300).validation()
    assert len(part) == 5 and corpus(val_bytes=None).validation().facts() == whole.facts()
    rows = [whole.batch(range(len(whole))).inputs.tolist().index(row) for row in part.batch(range(5)).inputs.tolist()]
    assert rows == np.linspace(0, len(whole) - 1, 5).round().tolist()
    assert part.facts() == {"scored_bytes": len(scored(part)[0]), "context": 64, "stride": 64}
    assert len(scored(part)[0]) < 300 <= 64 * 5


def test_a_split_is_small_when_it_travels_to_another_process(corpus):
    split = corpus().split("train")
    before = split.batch([2]).inputs
    sent = pickle.dumps(split)
    assert len(sent) < 2000 and torch.equal(pickle.loads(sent).batch([2]).inputs, before)


# ----------------------------------------------------------------------- scores


def test_bits_per_byte_of_known_predictions(corpus):
    task = corpus()
    scores = TokenScores(64, task.metrics)
    batch = task.split("test").batch(range(len(task.split("test"))))
    scores.update(torch.zeros(*batch.targets.shape, 256), batch.targets)
    result = scores.compute()
    assert set(result) == {"ce_loss", "bits_per_byte", "token_accuracy", "by_position"}
    assert float(result["bits_per_byte"]) == pytest.approx(8.0, abs=1e-6)
    counts = np.bincount(task.bytes_of("train"), minlength=256) + 1
    scores.reset()
    scores.update(torch.tensor(np.log(counts / counts.sum())).expand(*batch.targets.shape, 256), batch.targets)
    assert float(scores.compute()["bits_per_byte"]) == pytest.approx(task.references("test")["unigram"], abs=1e-5)


def test_gzip_is_that_of_the_whole_split(corpus):
    content = corpus().bytes_of("test").tobytes()
    assert corpus().references("test")["gzip_9"] == 8 * len(gzip.compress(content, 9)) / len(content)


def test_a_batch_size_changes_no_score(corpus):
    task = corpus(eval_stride=40)
    model = Stack(256, 16, 1, mixer=partial(Attention, n_heads=2), max_len=64)
    initialise(model, 0)
    found = []
    for size in (1, 7, 64):
        evaluation = Evaluation(task, model, 0)
        for batch in EvalLoader(task.split("test"), size):
            evaluation.update(model, batch)
        found.append(evaluation.compute(model)[0]["bits_per_byte"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-6) and 7 < found[0] < 9


def test_a_task_cannot_name_a_metric_that_is_not_there():
    with pytest.raises(ValueError, match="token_accuracy, exact_match, bits_per_byte; got perplexity"):
        TokenScores(4, ["perplexity"])


def test_text_and_tokens():
    task = StandardLibrary()
    assert task.encode("é\n") == [0xC3, 0xA9, 10] and task.decode([0xC3, 0xA9, 10]) == "é\n"
    assert task.decode([0xC3]) == "\ufffd"
    assert bytes(task.encode(os.fsdecode(b"a\xff"))) == b"a\xff", "bytes of a command line that are no text"


# ----------------------------------------------------------------------- a run

WORDS = (
    "task=stdlib", "model=transformer", "model.d_model=16", "model.n_layers=1", "model.mixer.n_heads=2", "task.seq_len=32",
    "task.val_bytes=256", "trainer.max_steps=8", "trainer.batch_size=4", "trainer.val_every=4", "trainer.checkpoint_every=4",
    "trainer.log_every=2", "trainer.accelerator=cpu", "optimizer.lr=1e-2", "~callbacks.progress", "~logger", "run_dir=run",
)  # fmt: skip


@pytest.fixture
def trained(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return train(compose([*WORDS, f"task.source={source}"]))


def test_a_run_reports_bits_per_byte(trained, source, in_process, capsys):
    logged = json.loads((trained.path / "metrics.json").read_text())
    assert set(logged["metrics"]) == {"loss", "ce_loss", "bits_per_byte", "token_accuracy"}
    assert logged["metrics"]["bits_per_byte"] == pytest.approx(logged["metrics"]["ce_loss"] / math.log(2))
    assert 224 < logged["data"]["scored_bytes"] <= 256 and set(logged["references"]) == {"uniform", "unigram", "gzip_9"}
    rows = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
    assert {"train/bits_per_byte", "val/bits_per_byte"} <= {name for row in rows for name in row}
    assert not any("exact_match" in name for row in rows for name in row)

    capsys.readouterr()
    assert in_process("lab-eval", "run", "task.eval_lengths=[1,2]", "task.eval_stride=8") == 0
    said = capsys.readouterr().out
    result = json.loads((trained.path / "eval" / "test-best.json").read_text())
    task = StandardLibrary(source=str(source))
    assert result["references"] == task.references("test")
    n = len(task.bytes_of("test"))
    assert result["data"] == {**task.facts(), "scored_bytes": n, "context": 32, "stride": 8}
    assert result["by_length"]["64"] == "not applicable (max_len 32)"
    for text in ("bits_per_byte", "gzip_9 (no model)", f"{result['references']['gzip_9']:.4f}", f"scored_bytes {n}, context 32, stride 8"):
        assert text in said


def test_it_learns_more_than_frequencies(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    longer = ["trainer.max_steps=200", "trainer.val_every=200", "trainer.batch_size=8", f"task.source={source}"]
    run = train(compose([*WORDS, *longer]))
    logged = json.loads((run.path / "metrics.json").read_text())
    assert logged["metrics"]["bits_per_byte"] < 0.75 * logged["references"]["unigram"]


def test_other_bytes_than_those_of_training_are_refused(trained, source):
    put(source / "module_00.py", "changed = True\n")
    with pytest.raises(RunError, match="best.ckpt was trained on other data, .*: sha256 .* then, .* here; bytes"):
        evaluate_run("run", [], [])
    with pytest.raises(RunError, match="last.ckpt was trained on other data"):
        resume("run", ["trainer.max_steps=9"], [])
    assert Run("run").job()["status"] == "done" and Run("run").config()["trainer"]["max_steps"] == 8, "a refused resume wrote"


def test_a_model_is_loaded_without_its_data(trained, source):
    import lab

    source.rename(source.with_name("gone"))
    model, task, _ = lab.load("run")
    assert task.decode(task.encode("x")) == "x" and model.max_len == 32
