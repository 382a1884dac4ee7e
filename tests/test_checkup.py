"""lab-doctor --model: a right model passes, a wrong one is told where it fails, and a name that means nothing is one sentence."""

from __future__ import annotations

import json

import pytest
import torch

from lab import ops
from lab.analysis import checkup, conformance
from lab.analysis.checkup import CHECKS, SMALL, condensed, failure, why_not
from lab.analysis.subjects import subjects
from lab.cli.doctor import main
from lab.config import ConfigError

MIXERS = '''
import torch
from torch import nn
from lab.mixers import Mixer, Output

class Peeking(Mixer):
    """Reads one token ahead from position `since` on."""
    def __init__(self, d_model: int, since: int = 4) -> None:
        super().__init__()
        self.since, self.linear = since, nn.Linear(d_model, d_model)

    def mix(self, x, state, lengths, want):
        y = self.linear(x)
        ahead = torch.cat([y[:, 1:], torch.zeros_like(y[:, :1])], 1)
        place = torch.arange(x.shape[1])[:, None]
        return Output(y + torch.where(place >= self.since, ahead, 0), state=x[:, :0])

class Stumbling(Peeking):
    def mix(self, x, state, lengths, want):
        if x.shape[1] == 1:
            raise KeyError("one token")
        return super().mix(x, state, lengths, want)

class Unfinished(Mixer):
    def __init__(self, d_model: int, rate: float) -> None:
        self.linear = nn.Linear(d_model, d_model)

    def mix(self, x, state, lengths, want):
        return Output(x)

class Narrow(Mixer):
    def mix(self, x, state, lengths, want):
        return Output(x)

def linear(d_model: int = 4, n_layers: int = 1):
    return nn.Linear(d_model, d_model)

WIDTH = 3
'''


@pytest.fixture
def mixers(tmp_path, monkeypatch):
    """A module of the user's own, in the current folder."""
    (tmp_path / "of_the_reader.py").write_text(MIXERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "of_the_reader", raising=False)
    return "of_the_reader"


def doctor(capsys, *words):
    """(exit code, what was printed as JSON, stderr)."""
    with ops.use():
        code = main([*words, "--format", "json"])
    said = capsys.readouterr()
    return code, json.loads(said.out)["models"], said.err


def by_name(found):
    return {entry["check"]: entry for entry in found["checks"]}


def test_a_registered_model_passes(capsys):
    code, (found,), errors = doctor(capsys, "--model", "mamba", "model.d_model=16", "ops.causal_conv=torch")
    assert code == 0 and errors == "" and found["name"] == "mamba" and found["failed"] == 0
    assert found["parameters"] < 10_000, "it is made small, and the words count"
    checks = by_name(found)
    assert {name for name, entry in checks.items() if entry["result"] != "passed"} == {"source"}
    assert checks["source"]["result"] == "not applicable" and checks["source"]["reason"] == "it takes no source"
    assert all(entry["seconds"] > 0 and entry["reason"] is None for name, entry in checks.items() if name != "source")


def test_every_check_is_asked():
    own = {name.removeprefix("check_") for name in vars(conformance) if name.startswith("check_")}
    assert set(CHECKS) == own and all(checkup.asks(check) for check in CHECKS.values())


def test_a_mixer_that_reads_the_future_is_caught_and_the_place_is_said(mixers, capsys, monkeypatch):
    monkeypatch.setattr(checkup, "CHECKS", {name: CHECKS[name] for name in ("causality", "gradients", "checkpoint")})
    code, (found,), errors = doctor(capsys, "--model", f"{mixers}.Peeking")
    checks = by_name(found)
    assert code == 1 and found["failed"] == 1 and checks["causality"]["result"] == "failed"
    reason = checks["causality"]["reason"]
    assert reason.startswith("logits before 5 depend on tokens from 5 on: off by ") and ", position 4, logit " in reason
    assert errors == "lab-doctor: of_the_reader.Peeking: 1 of 3 checks failed: causality\n"
    monkeypatch.setattr(checkup, "CHECKS", {"causality": CHECKS["causality"]})
    assert main(["--model", f"s4d,{mixers}.Peeking", "model.d_model=16"]) == 1  # and as tables
    said = capsys.readouterr()
    assert said.err == "lab-doctor: of_the_reader.Peeking: 1 of 1 checks failed: causality\n"
    assert "s4d, " in said.out and "all 1 checks passed" in said.out and "logits before 5 depend on tokens from 5 on" in said.out
    code, (found,), _ = doctor(capsys, "--model", f"{mixers}.Peeking", "model.mixer.since=100")  # which none of nine tokens reaches
    assert code == 0


def test_an_error_of_the_readers_code_comes_with_its_line_and_ends_nothing(mixers, monkeypatch):
    line = 1 + MIXERS.splitlines().index('            raise KeyError("one token")')
    (subject,) = subjects([f"{mixers}.Stumbling"], [], **SMALL)
    monkeypatch.setattr(checkup, "CHECKS", {name: CHECKS[name] for name in ("continuation", "checkpoint")})
    checks = by_name(checkup.checkup(subject))
    assert checks["continuation"]["reason"] == f"KeyError: 'one token' (of_the_reader.py:{line})"
    assert checks["checkpoint"]["result"] == "passed"


def test_what_has_no_meaning_for_a_model_is_not_asked(capsys):
    words = "model.mixer.n_heads=4", "model.mixer.bidirectional=true"
    code, (found,), _ = doctor(capsys, "--model", "lab.mixers.Attention", *words)
    results = {name: entry["result"] for name, entry in by_name(found).items()}
    assert code == 0 and {name for name, result in results.items() if result == "passed"} == {
        "gradients", "batch_independence", "checkpoint",
    }  # fmt: skip
    assert by_name(found)["causality"]["reason"] == "it reads the future by design (causal=False): no state, no step"
    classifier = subjects(["s4d"], ["model.n_classes=3", "model.d_model=16"], **SMALL)[0].make()
    assert why_not("gradients", classifier) and why_not("batch_independence", classifier) is None
    assert why_not("padding", classifier) == "its head reads the whole input at once: no state, no step"
    short = subjects(["transformer"], ["model.max_len=20"], **SMALL)[0].make()
    assert why_not("borders", short).startswith("it was built for 20 tokens") and why_not("padding", short) is None
    (translator,) = subjects(["transformer_seq2seq"], ["model.d_model=16", "model.n_heads=2"], **SMALL)
    assert why_not("source", translator.make()) is None
    assert failure(lambda: checkup._run("source", translator)) is None and failure(lambda: checkup._run("causality", translator)) is None


def test_what_is_built():
    mixer, model = subjects(["lab.mixers.S4DLayer", "lab.models.Laminar"], ["model.d_model=16"], **SMALL)
    stack = mixer.make()
    assert type(stack).__name__ == "Stack" and type(stack.blocks[0].mixer).__name__ == "S4DLayer" and len(stack.blocks) == 2
    assert stack.d_model == model.make().d_model == 16 and stack.head.out_features == 11
    for one, other in zip(stack.parameters(), mixer.make().parameters(), strict=True):
        assert torch.equal(one, other), "the same weights each time"
    (made,) = subjects(["lab.models.create_model"], ["model.architecture=s4d", "model.num_layers=1"], **SMALL)
    assert len(made.make().blocks) == 1
    (mixed,) = subjects(["h3_attention"], ["model.d_model=16"], **SMALL)
    assert len(mixed.make().blocks) == len(mixed.node["pattern"]), "all of its layers, once"


@pytest.mark.parametrize(
    ("names", "words", "sentence"),
    [
        ("mamb", "", "--model mamb: configs/model has no such file; did you mean mamba?"),
        ("s4d,s4d", "", "--model: s4d is there twice"),
        ("s4d", "model.d_modl=3", "model.d_modl (command line): lab.models.Stack has no such argument; did you mean model.d_model?"),
        ("no_such_module.Mixer", "", "there is no module no_such_module"),
        ("of_the_reader.Peking", "", "of_the_reader has no Peking; did you mean Peeking?"),
        ("of_the_reader.Peeking", "model.mixer.sinse=3", "model.mixer.sinse: of_the_reader.Peeking has no such argument; did you mean"),
        ("of_the_reader.Peeking", "model.mixer.since=a", "model.mixer.since: expected an int, got 'a'"),
        ("of_the_reader.Peeking", "task.seq_len=3", "task.seq_len (command line): of_the_reader.Peeking has no task or trainer here; its"),
        ("of_the_reader.Unfinished", "", "model.mixer.rate: of_the_reader.Unfinished needs it; add model.mixer.rate=VALUE"),
        (
            "of_the_reader.Unfinished",
            "model.mixer.rate=1",
            "of_the_reader.Unfinished cannot be built: AttributeError: cannot assign module before Module.__init__() call (of_the",
        ),
        ("of_the_reader.Narrow", "", "of_the_reader.Narrow: a mixer takes d_model, the width of the Stack around it"),
        ("of_the_reader.WIDTH", "", "of_the_reader.WIDTH is a int; --model takes a Mixer, a SequenceModel, or a function that makes one"),
        ("of_the_reader.linear", "", "of_the_reader.linear makes a Linear, and lab-doctor looks at a lab.models.SequenceModel"),
        ("torch.nn.Linear", "", "torch.nn.Linear is neither a lab.mixers.Mixer nor a lab.models.SequenceModel;"),
        ("lab.mixers.Attention", "model.mixer.n_heads=5", "model: Attention: d_model=32 must be a multiple of n_heads=5"),
        ("s4d", "model.vocab_size=null", "s4d has no vocabulary, and the checks are of tokens; give model.vocab_size=11 or so"),
    ],
)
def test_what_means_nothing_is_one_sentence(mixers, names, words, sentence):
    with pytest.raises(ConfigError) as raised:
        subjects(names.split(","), words.split(), **SMALL)
    assert str(raised.value).startswith(sentence)


def test_options_that_do_not_go_together(capsys):
    for words, sentence in (
        (["--profile"], "--profile is of models: add --model NAME, such as --model mamba"),
        (["--model", "s4d", "--lengths", "8"], "--lengths belongs to --profile"),
        (["--profile", "--model", "s4d", "--lengths", "8,x"], "--lengths 8,x: expected numbers of tokens from 2 on, with commas, such as"),
        (["--model", "s4d", "ops.no_such=torch"], "ops.no_such: there is no such op"),
        (["ops.fft_conv"], "ops.fft_conv: the backend is missing, such as ops.selective_scan=torch"),
    ):
        assert main(words) == 2
        assert capsys.readouterr().err.startswith(f"lab-doctor: {sentence}")


def test_what_a_check_says_is_condensed():
    def off(shape, place):
        got, want = torch.zeros(shape), torch.zeros(shape)
        got[place] = 0.25
        return lambda what: failure(lambda: conformance.same(got, want, what))

    assert off((2, 3, 4), (1, 2, 3))("prefill of 3") == "prefill of 3: off by 0.25 at row 1, position 2, logit 3; 1 of 24 values differ"
    assert off((2, 4), (1, 3))("step 1 after a prefill of 2").endswith("of 2: off by 0.25 at row 1, logit 3; 1 of 8 values differ")
    assert off((2, 4), (1, 3))("row 0 alone") == "row 0 alone: off by 0.25 at position 1, logit 3; 1 of 8 values differ"
    assert off((2, 4), (1, 3))("padding") == "padding: off by 0.25 at index (1, 3); 1 of 8 values differ"
    assert off((), ())("loss size") == "loss size: off by 0.25"
    assert condensed("blocks.0.idle has\n no gradient") == "blocks.0.idle has no gradient"
