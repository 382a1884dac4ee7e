"""lab-generate: prompts in, new tokens out, as text or ids, the same as the model's own; and its mistakes."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
import torch
from conftest import TINY

import lab
from lab.cli import generate
from lab.config import compose
from lab.tasks import Corpus
from lab.training import train

LIBRARY = "# größer\ndef function(x):\n    return x + 1\n" * 100
WORDS = (
    *(word for word in TINY if not word.startswith("task.")), "task=stdlib", "task.source=source", "task.seq_len=16",
    "task.val_bytes=256", "model=transformer", "~logger", "run_dir=text",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs: `ids` of copy-reverse, and `text` of bytes, both barely trained."""
    folder = tmp_path_factory.mktemp("generate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "source").mkdir()
        for i in range(40):
            (folder / "source" / f"module_{i}.py").write_text(LIBRARY)
        train(compose([*TINY, "model=lot", "trainer.max_steps=6", "~logger", "run_dir=ids"]))
        train(compose([*WORDS, "trainer.max_steps=6"]))
    return folder


@pytest.fixture
def say(folder, monkeypatch, capsys):
    """say(*words) runs the command and gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)

    def call(*words):
        try:
            code = generate.main(list(words))
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return call


def greedy(run, prompt, n):
    """By the argmax of whole forwards."""
    model = lab.load(run)[0]
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_is_the_argmax_of_forward(say):
    want = greedy("ids", [5, 9, 3, 2], 4)
    assert say("ids", "--prompt", "5 9 3 2", "--max-new-tokens", "4") == (0, " ".join(map(str, want)) + "\n", "")
    assert say("ids", "--prompt", "5, 9,3 2")[1].split() == [str(token) for token in greedy("ids", [5, 9, 3, 2], 5)], (
        "as many as there is room"
    )
    text = bytes(greedy("text", b"def f", 9)).decode("utf-8", "replace")
    assert say("text", "--prompt", "def f", "--max-new-tokens", "9") == (0, text + "\n", "")


def test_several_prompts_are_the_single_ones(say, folder):
    prompts = ["5 9 3 2", "7", "4 4"]
    alone = [say("ids", "--prompt", prompt, "--max-new-tokens", "4")[1] for prompt in prompts]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    code, out, _ = say("ids", *words, "--max-new-tokens", "4")
    assert code == 0 and out == "".join(f"--- {i}: {prompt}\n{row}" for i, (prompt, row) in enumerate(zip(prompts, alone, strict=True), 1))
    (folder / "prompt.txt").write_text("5 9 3 2\n")
    assert say("ids", "--prompt-file", "prompt.txt", "--max-new-tokens", "4")[1] == alone[0]
    assert say("ids", *words, "--max-new-tokens", "0")[0] == 0


def test_sampling_is_by_its_seed(say):
    words = ["text", "--prompt", "d", "--temperature", "5", "--max-new-tokens", "12"]
    assert say(*words)[1] == say(*words, "--seed", "0")[1] != say(*words, "--seed", "1")[1]
    cold = say("text", "--prompt", "d", "--max-new-tokens", "12")[1]
    assert say(*words, "--top-k", "1")[1] == say(*words, "--top-p", "1e-9")[1] == cold != say(*words)[1]


def test_a_stop_token_ends_each_text(say):
    free = [say("ids", "--prompt", prompt, "--max-new-tokens", "5")[1].split() for prompt in ("5 9", "3 3 7")]
    stop = free[0][2]
    ends = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert say("ids", "--prompt", "5 9", "--stop-token", stop)[1].split() == ends[0]
    out = say("ids", "--prompt", "5 9", "--prompt", "3 3 7", "--max-new-tokens", "5", "--stop-token", stop)[1]
    assert [line.split() for line in out.splitlines()[1::2]] == ends


def test_best_or_last(say, folder, monkeypatch):
    seen, load = [], lab.load
    monkeypatch.setattr(lab, "load", lambda *a: seen.append(a) or load(a[0]))
    for words in (["ids"], ["ids", "checkpoint=last", "--trust", "mine"]):
        assert say(*words, "--prompt", "5", "--max-new-tokens", "1")[0] == 0
    assert seen == [("ids", None, []), ("ids", "last", ["mine"])]
    assert say("ids/checkpoints/last.ckpt", "--prompt", "5", "--max-new-tokens", "1")[0] == 0


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        ("héß€🙂x".encode(), ["h", "é", "ß", "€", "🙂", "x", "\n"]),
        (b"a\xe2\x82", ["a", "\ufffd\n"]),
        (b"\xff\xfe\xe2\x82\xac.", ["\ufffd", "\ufffd", "€", ".", "\n"]),
        (b"\x80" * 50, ["\ufffd"] * 49 + ["\ufffd\n"]),
        (b"\xef\xbf\xbd\xf0\x9f\x99(", ["\ufffd", "\ufffd(", "\n"]),
        (b"", ["\n"]),
    ],
)
def test_text_comes_in_whole_characters(monkeypatch, tokens, pieces):
    class Out(io.StringIO):
        encoding = "utf-8"

        def write(self, text):
            written.append(text)
            return len(text)

    written = []
    monkeypatch.setattr(sys, "stdout", Out())
    task = type("Text", (Corpus,), {"__init__": lambda self: None, "keys": None, "read": None})()
    generate._print(iter(tokens), task)
    assert written == pieces


@pytest.mark.parametrize(("terminal", "shown"), [(True, "a\\x1b[2J\\x9b\té\n"), (False, "a\x1b[2J\x9b\té\n")])
def test_control_characters_do_not_reach_a_terminal(monkeypatch, terminal, shown):
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(out, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", out)
    generate._write("a\x1b[2J\x9b\té\n")
    assert out.buffer.getvalue().decode() == shown


def test_the_longest_seed_is_fine(say):
    assert say("ids", "--prompt", "5", "--temperature", "1", "--seed", str(2**64 - 1), "--max-new-tokens", "1")[0] == 0


def test_tokens_are_printed_as_they_come(say, monkeypatch):
    """When the model makes token n, token n - 1 is out."""
    from lab.models import SequenceModel

    progress, written = [], []
    monkeypatch.setattr(generate, "_write", written.append)
    stream = SequenceModel.stream

    def watched(self, *args, **kwargs):
        for token in stream(self, *args, **kwargs):
            progress.append(len(written))
            yield token

    monkeypatch.setattr(SequenceModel, "stream", watched)
    assert say("ids", "--prompt", "5 9", "--max-new-tokens", "4")[0] == 0
    assert progress == [0, 1, 2, 3]


def test_a_command_with_bytes_that_are_no_text(folder, command):
    """Prompt bytes reach the model as they are; a stdout that lacks a character shows a question mark."""
    prompt = b"d\xff"
    want = bytes(greedy(folder / "text", prompt, 6)).decode("utf-8", "replace")
    done = subprocess.run(
        [sys.executable, "-m", "lab.cli.generate", "text", "--prompt-file", "-", "--max-new-tokens", "6"],
        cwd=folder, input=prompt, capture_output=True, timeout=120, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if b"does not use backend native" not in line]  # without a compiler
    assert (done.returncode, said) == (0, [])
    assert done.stdout.decode() == want.encode("ascii", "replace").decode() + "\n"


def test_a_model_that_reads_the_future_labels_but_does_not_generate(folder, say):
    """A user's own data set may have such a model: it trains and is validated, and lab-generate says what it cannot do."""
    (folder / "labels.py").write_text(
        "class Data(list):\n    def __init__(self):\n        super().__init__([([3, 4, 5], [5, 3, 4])] * 32)\n"
    )
    task = ["task=dataset", "task.vocab_size=9", "task.seq_len=3", *(f"+task.{split}._target_=labels.Data" for split in ("train", "val"))]
    of_model = ["model=s4d_tiny", "model.d_model=8", "model.n_layers=1", "model.mixer.d_state=4", "model.mixer.bidirectional=true"]
    kept = [word for word in TINY if not word.startswith(("task.", "model."))]
    train(compose([*kept, *task, *of_model, "~logger", "run_dir=labels"]))
    code, _, line = say("labels", "--prompt", "5", "--trust", "labels")
    assert (code, line) == (2, "lab-generate: labels: its model reads the future, so it cannot go on from a prompt\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ids"], "there is no prompt: --prompt TEXT or --prompt-file FILE"),
        (["ids", "--prompt", ""], "the prompt is empty"),
        (["ids", "--prompt", "5 x"], "the prompt '5 x' must be token ids, such as '5 6 7 2': CopyReverse has no text"),
        (["ids", "--prompt", "5 12"], "the prompt has the token 12; those of CopyReverse are 0 to 11"),
        (
            ["ids", "--prompt", "5 9", "--max-new-tokens", "8"],
            "max_len 8: after a prompt of 2 tokens it has room for 7 new ones, --max-new-",
        ),
        (["ids", "--prompt", "3 3 3 3 3 3 3 3 3"], "max_len 8: after a prompt of 9 tokens it has room for 0 new ones"),
        (["ids", "--prompt", "5", "--max-new-tokens", "-1"], "max_new_tokens=-1 must not be negative"),
        (["ids", "--prompt", "5", "--temperature", "-1"], "temperature=-1.0 must not be negative"),
        (["ids", "--prompt", "5", "--top-k", "3"], "--top-k and --top-p choose among tokens that are sampled: they need a --temperature"),
        (["ids", "--prompt", "5", "--temperature", "1", "--top-p", "2"], "top_p=2.0 must lie in (0, 1]"),
        (["ids", "--prompt", "5", "--stop-token", "12"], "--stop-token 12: the tokens of CopyReverse are 0 to 11"),
        (["ids", "--prompt", "5", "--seed", str(2**64)], "--seed must lie in 0 to 2^64 - 1, got 18446744073709551616"),
        (["ids", "checkpoint=first", "--prompt", "5"], "checkpoint=first: of a run, only checkpoint=best or checkpoint=last"),
        (["checkpoint=last", "--prompt", "5"], "the run or checkpoint comes first"),
        (["nowhere", "--prompt", "5"], "nowhere: there is no such run folder"),
        (["ids", "--prompt-file", "nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["ids", "--promt", "5"], "did you mean --prompt?"),
    ],
)
def test_a_mistake_is_one_line(say, words, sentence):
    code, out, err = say(*words)
    assert code in (1, 2) and out == "" and err.count("\n") == 1
    assert err.startswith("lab-generate: ") and sentence in err
