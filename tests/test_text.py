"""Text of one's own: documents from files and data sets, shared out by content, tokenized, prepared once, scored by the byte."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import torch

import lab
from lab.analysis.metrics import TokenScores
from lab.config import ConfigError, compose
from lab.tasks import Text, prepared, text
from lab.tasks.documents import share_out
from lab.training import evaluate_run, train
from lab.training.experiment import prepare

WORDS_OF = ("cat", "dog", "owl")
ROOT = Path(__file__).parents[1]
DOCUMENTS = [f"Document {i}: " + " ".join(f"the {word} of größe {i * k}" for k, word in enumerate(WORDS_OF)) for i in range(80)]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The same documents as text, JSON Lines and Parquet, in the current folder."""
    monkeypatch.setenv("LAB_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    for i, document in enumerate(DOCUMENTS):
        path = tmp_path / f"texts/{i % 3}/{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document)
    (tmp_path / "all.txt").write_text("\n\n".join(DOCUMENTS) + "\n")
    (tmp_path / "lines.txt").write_text("\n".join(DOCUMENTS) + "\n")
    (tmp_path / "all.jsonl").write_text("\n".join(json.dumps({"text": document, "n": 1}) for document in DOCUMENTS))
    return tmp_path


def corpus(path="all.jsonl", **changes):
    return Text(**{"path": path, "seq_len": 32, **changes})


def bpe(**changes):
    return corpus(**{"tokenizer": "bpe", "vocab_size": 300, **changes})


def documents_of(task, name):
    """The documents of a split, from its tokens."""
    stream = task.bytes_of(name)
    ends = np.flatnonzero(stream == task.vocab_size - 1)
    assert ends[-1] == len(stream) - 1, "the last document ends too"
    return [task.decode(part[:-1].tolist()) for part in np.split(stream, ends + 1)[:-1]]


# ----------------------------------------------------------------------- documents and splits


@pytest.mark.parametrize("make", [corpus, bpe])
def test_every_document_is_in_one_split_whole(files, make):
    task = make()
    found = {name: documents_of(task, name) for name in ("train", "val", "test")}
    assert sorted(sum(found.values(), [])) == sorted(DOCUMENTS)
    total = sum(len(document.encode()) for document in DOCUMENTS)
    for name in ("val", "test"):
        assert found[name] == [document for document in DOCUMENTS if document in found[name]], "in the order of the source"
        assert 0.02 < sum(len(document.encode()) for document in found[name]) / total <= 0.05
    assert task.facts()["bytes"] == total and task.facts()["documents"] == 80


def test_the_forms_of_a_source_are_equal(files):
    pandas.DataFrame({"text": DOCUMENTS}).to_parquet(files / "all.parquet")
    whole = corpus().facts()
    for path, unit in (("all.txt", "paragraph"), ("lines.txt", "line"), ("all.parquet", "file")):
        assert corpus(path, documents=unit).facts() == whole, path
    mixed = corpus(["texts/0/*.txt", "texts/[12]/*.txt"])
    assert corpus("texts/**/*.txt").facts() == mixed.facts() and mixed.facts()["bytes"] == whole["bytes"]
    assert {name: sorted(documents_of(mixed, name)) for name in ("val", "test")} == {
        name: sorted(documents_of(corpus(), name)) for name in ("val", "test")
    }, "no order changes what is in a split"


def test_equal_documents_are_in_one_split_and_empty_ones_in_none(files):
    rows = [{"text": document} for document in [*DOCUMENTS, *DOCUMENTS[::-1], ""]]
    (files / "twice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = corpus("twice.jsonl")
    assert (task.facts()["documents"], task.facts()["duplicates"], task.facts()["empty"]) == (160, 80, 1)
    found = [set(documents_of(task, name)) for name in ("train", "val", "test")]
    assert sum(map(len, found)) == 80 == len(set.union(*found))


def test_shares():
    digests, lengths = np.arange(100, dtype=np.uint64)[::-1].copy(), np.full(100, 10)
    split = share_out(digests, lengths, 0.1, 0.2)
    assert np.bincount(split).tolist() == [72, 9, 19] and (split[-19:] == 2).all(), "test has the lowest digests"
    lengths[-1] = 10_000
    assert share_out(digests, lengths, 0.1, 0.2)[-1] == 0, "a document larger than a share is for training"
    assert sorted(share_out(digests[:3], np.array([5, 900, 100]), 0.05, 0.05)) == [0, 1, 2], "few documents: one each"


def test_a_hub_data_set(files, monkeypatch):
    (files / "set").mkdir()
    (files / "all.jsonl").rename(files / "set/train.jsonl")
    load = datasets.load_dataset
    local = {"my/set": "set"}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *a, revision, **b: load(local.get(name, name), *a, **b))
    task = Text(hub="my/set", streaming=True, seq_len=32)
    assert sorted(sum((documents_of(task, name) for name in ("train", "val", "test")), [])) == sorted(DOCUMENTS)
    limited = Text(hub="my/set", streaming=True, seq_len=16, limit_bytes=1000)
    assert 1000 <= limited.facts()["bytes"] < 1100
    assert task.facts()["revision"] is None and Text(hub="my/set", streaming=True, revision="v2").facts()["revision"] == "v2"
    with pytest.raises(ConfigError, match="^task.hub: nobody/nothing cannot be loaded: "):
        Text(hub="nobody/nothing", seq_len=32).split("train")
    with pytest.raises(ConfigError, match="task.field: row 1 of my/set has no field body; it has text, n"):
        Text(hub="my/set", streaming=True, field="body").split("train")
    with pytest.raises(ConfigError, match="^task.hub: set is a file or folder here, not a data set of the Hub: task.path reads files$"):
        Text(hub="set", streaming=True).split("train")


def test_a_hub_that_breaks_off_is_one_sentence(files, monkeypatch):
    def rows():
        yield {"text": "one"}
        raise ConnectionError("the line is dead\nand more")

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **b: rows())
    with pytest.raises(ConfigError, match="^task.hub: my/set cannot be loaded: ConnectionError: the line is dead$"):
        Text(hub="my/set", streaming=True).split("train")


# ----------------------------------------------------------------------- tokens


def test_a_bpe_gives_back_every_byte(files):
    task = bpe()
    sample = "größe\r\n\t 日本 <|endoftext|> \x00 "
    assert task.decode(task.encode(sample)) == sample
    pieces = task.tokenizer.pieces
    assert len(pieces) == 299 == task.vocab_size - 1 and len(set(pieces)) == 299 and b" the" in pieces
    assert len(task.encode(DOCUMENTS[0])) < 0.6 * len(DOCUMENTS[0].encode())
    assert task.bytes_of("train").dtype == np.uint16
    assert task.stop_token == 299 and task.decode([299]) == ""


def test_bytes_are_charged_not_tokens(files):
    """Uniform predictions cost log2 V bits a token; the text of a split has the same bytes, however it is cut."""
    n = sum(len(document.encode()) for document in documents_of(corpus(), "test"))
    for task in (corpus(), bpe()):
        scores, split = TokenScores(32, task.metrics, token_bytes=task.token_bytes), task.split("test")
        batch = split.batch(range(len(split)))
        scores.update(torch.zeros(*batch.targets.shape, task.vocab_size), batch.targets)
        result, tokens = scores.compute(), len(task.bytes_of("test"))
        assert float(result["bits_per_byte"]) == pytest.approx(np.log2(task.vocab_size) * tokens / n)
        assert float(result["bits_per_byte"]) == pytest.approx(task.references("test")["uniform"])
        assert float(result["perplexity"]) == pytest.approx(task.vocab_size)
        assert split.facts() == {"scored_bytes": n, "scored_tokens": tokens, "context": 32, "stride": 32}
        assert task.references("test")["gzip_9"] == pytest.approx(corpus().references("test")["gzip_9"])
    assert len(bpe(val_bytes=100).validation()) < len(bpe().split("val"))


# ----------------------------------------------------------------------- prepared once, by content


def test_a_file_is_known_by_its_content(files, monkeypatch):
    first = bpe().prepared
    with monkeypatch.context() as patch:
        patch.setattr(Text, "read", lambda self: pytest.fail("prepared again"))
        assert bpe().prepared == first
        os.utime("all.jsonl", (0, 0))
        os.rename("all.jsonl", "other.jsonl")
        assert bpe(path="other.jsonl").prepared == first
        patch.setattr(Text, "content", lambda self: pytest.fail("looked at again"))
        assert bpe(path="other.jsonl").prepared == first
    changed = [*DOCUMENTS[:-1], DOCUMENTS[-1].replace("cat", "tac")]  # of the same length
    (files / "other.jsonl").write_text("\n".join(json.dumps({"text": document, "n": 1}) for document in changed))
    assert bpe(path="other.jsonl").facts()["sha256"] != first.facts["sha256"]
    assert bpe(path="other.jsonl", val_share=0.2).facts()["sha256"] != bpe(path="other.jsonl").facts()["sha256"]


def test_a_preparation_that_breaks_off_leaves_nothing(files, monkeypatch):
    data = files / "data"
    with monkeypatch.context() as patch:
        patch.setattr(text, "BATCH", 100)
        encode = text.Bytes.encode
        calls = []
        patch.setattr(text.Bytes, "encode", lambda self, texts: calls.append(1) or (encode(self, texts) if len(calls) < 4 else 1 / 0))
        with pytest.raises(ZeroDivisionError):
            corpus().split("train")
    assert [path.suffix for path in data.iterdir()] == [".lock"]
    (lock,) = data.iterdir()
    stale = data / f".{lock.stem}.bin.12345.tmp"  # of a process that was killed
    stale.write_text("half")
    corpus().split("train")
    assert not stale.exists() and not list(data.glob(".*"))


def test_without_locks_the_files_of_others_stay(files, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(prepared.fcntl, "flock", no_locks)
    corpus().split("train")
    (made,) = (files / "data").glob("*.bin")
    made.unlink()
    other = made.with_name(f".{made.name}.12345.tmp")  # of a process that prepares the same
    other.write_text("half")
    corpus().split("train")
    assert made.exists() and other.exists()


def test_progress_is_told_on_stderr(files, monkeypatch, capsys):
    progress = text.Progress
    monkeypatch.setattr(text, "Progress", lambda what: progress(what, first=0, every=0))
    monkeypatch.setattr(text, "BATCH", 1000)
    bpe().split("train")
    said = capsys.readouterr().err
    assert re.search(r"text: read [\d,]+ bytes, documents: 80 \(0 s\)", said)
    assert "training the tokenizer on " in said and re.search(r"encoding train, [\d,]+ of [\d,]+ bytes", said)


# ----------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"path": None}, "task.path names the files of task=text, or task.hub"),
        ({"vocab_size": 256}, "task.vocab_size must be 257 for task.tokenizer=bytes"),
        ({"tokenizer": "bpe", "vocab_size": 257}, "task.vocab_size must be at least 258"),
        ({"val_share": 0.5, "test_share": 0.5}, "task.val_share and test_share"),
        ({"limit_bytes": 0}, "task.limit_bytes"),
        ({"path": "nothing/*.txt"}, "task.path: there is no file nothing/\\*.txt$"),
        ({"path": "texts"}, "task.path: there is no file texts; it is a folder: task.path=texts/\\*\\*/\\*.txt"),
        ({"field": "body"}, "task.field: line 1 of all.jsonl has no field body; it has text, n"),
        ({"field": "n"}, "task.field: n in line 1 of all.jsonl is no text but a int"),
        ({"path": "bad.jsonl"}, "task.path: line 2 of bad.jsonl is no JSON: "),
        ({"path": "bad.parquet"}, "^task.path: bad.parquet cannot be loaded: ArrowInvalid: [^\n]*$"),
        ({"path": "all.txt"}, "1 different documents, .* task.documents=paragraph or line makes more of text files"),
        ({"path": "latin.txt", "documents": "line", "tokenizer": "bpe", "vocab_size": 300}, "task.tokenizer: .* no UTF-8 text"),
        ({"tokenizer": "bpe", "vocab_size": 50000}, "task.vocab_size: the training documents give .* tokens.*: at most"),
    ],
)
def test_a_mistake_is_one_sentence(files, changes, sentence):
    (files / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (files / "bad.parquet").write_bytes(b"PAR1" + bytes(100))
    (files / "latin.txt").write_bytes("\n".join(DOCUMENTS).encode("latin-1"))
    with pytest.raises((ValueError, ConfigError), match=sentence):
        corpus(**changes).split("train")


# ----------------------------------------------------------------------- a run


def test_the_commands_of_the_page_are_whole(monkeypatch, tmp_path):
    """As they are typed, in a checkout; test_documents.py runs the first ones with other sizes."""
    monkeypatch.setenv("LAB_DATA", str(tmp_path))
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/language_modelling.md").read_text()
    first, *others = [compose(shlex.split(line)).config for line in re.findall("^lab-train (.*)$", page, re.MULTILINE)]
    assert prepare(first).max_steps and len(others) == 5
    assert all(config["trainer"]["max_steps"] for config in others)


WORDS = (
    "task=text", "task.path=all.jsonl", "task.tokenizer=bpe", "task.vocab_size=290", "task.seq_len=16", "task.val_bytes=200",
    "model=mamba_tiny", "model.d_model=16", "model.n_layers=1", "trainer.max_steps=6", "trainer.batch_size=4", "trainer.val_every=3",
    "trainer.checkpoint_every=3", "trainer.log_every=1", "trainer.accelerator=cpu", "optimizer.lr=1e-2", "~callbacks.progress", "~logger",
    "run_dir=run",
)  # fmt: skip


def test_a_run_keeps_its_tokenizer(files, monkeypatch, capsys):
    run = train(compose(list(WORDS)))
    document = json.loads((run.path / "metrics.json").read_text())
    assert {"ce_loss", "perplexity", "bits_per_byte"} < set(document["metrics"])
    assert re.fullmatch("bpe [0-9a-f]{64}", document["data"]["tokenizer"])
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["step"] == 1 and "train/loss" in row]
    assert 0.4 < row["train/bits_per_byte"] / row["train/ce_loss"] < 1.2 and "train/bytes_per_token" not in row
    first = evaluate_run("run", [], [])[0]

    for file in (files / "data").iterdir():
        file.unlink()
    monkeypatch.setattr(text, "train_bpe", lambda *_: pytest.fail("trained again"))
    (files / "all.jsonl").rename(files / "moved.jsonl")
    model, task, _ = lab.load("run")
    tokens = task.encode("Document 5: the owl")
    assert task.decode(tokens) == "Document 5: the owl" and max(tokens) < 289 and len(tokens) < 15, "without the data"
    again = evaluate_run("run", ["task.path=moved.jsonl"], [])[0]
    assert again["metrics"] == first["metrics"] and again["data"] == first["data"]

    from lab.cli.generate import main

    capsys.readouterr()
    assert main(["run", "--prompt", "Document", "--max-new-tokens", "5"]) == 0
    assert "�" not in capsys.readouterr().out[:1]


def test_generation_ends_with_the_document(files, capsys, monkeypatch):
    from lab.cli.generate import main

    train(compose([*WORDS, "trainer.max_steps=1", "task.tokenizer=bytes", "task.vocab_size=257"]))
    seen = []
    stream = lab.models.SequenceModel.stream
    monkeypatch.setattr(
        lab.models.SequenceModel, "stream", lambda *args, **words: seen.append(words["stop_token"]) or stream(*args, **words)
    )
    assert main(["run", "--prompt", "D", "--max-new-tokens", "2"]) == 0 and seen == [256]
