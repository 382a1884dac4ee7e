"""lab-doctor --profile: exponents of models whose cost is known, by a clock of their own; memory of a process; what is written."""

from __future__ import annotations

import io
import json
import math
import os
import signal
from functools import partial

import pytest
import torch
from torch import nn

from lab import ops
from lab.analysis import measuring
from lab.analysis.measuring import in_child, in_turn
from lab.analysis.profile import exponent, notes, profile, small, table
from lab.analysis.profile_plot import PANELS, growth
from lab.analysis.subjects import Subject, subjects
from lab.cli.doctor import main
from lab.config import ConfigError
from lab.mixers.base import Output
from lab.models import SequenceModel

LENGTHS = [64, 128, 256, 512]


class Clock:
    """Stands still but for what a Toy adds."""

    now = 0.0

    def __call__(self):
        return Clock.now


class Toy(SequenceModel):
    """A call of L tokens behind P others takes `seconds`(P + L) - `seconds`(P), a state of P tokens P floats, or 2 where it is fixed."""

    def __init__(self, power: float, vocab_size: int, fixed: bool = False) -> None:
        super().__init__()
        self.power, self.fixed, self.head = power, fixed, nn.Embedding(vocab_size, vocab_size)

    def forward(self, tokens, state=None, *, lengths=None, source=None, source_lengths=None, want=()):
        before = 0 if state is None else int(state["position"])
        after = before + tokens.shape[1]
        Clock.now += 1e-3 * (after**self.power - before**self.power)
        out = Output(self.head(tokens), {"position": torch.tensor([after]), "cache": torch.zeros(1, 2 if self.fixed else after)})
        return out if want else out.y

    def init_state(self, batch_size, source=None, source_lengths=None, device=None, dtype=None):
        return None


def toy(name, power, fixed=False):
    return Subject(name, {"power": power, "vocab_size": 2, "fixed": fixed})


def cost(prepare):
    """In place of memory: what the run adds to the clock."""
    run = prepare()
    before = Clock.now
    run()
    return Clock.now - before


@pytest.fixture
def toys(monkeypatch):
    """A linear model with a state of fixed size, and a quadratic one whose state grows."""
    monkeypatch.setattr(Subject, "make", lambda self: Toy(**self.node))
    return [toy("linear", 1.0, fixed=True), toy("quadratic", 2.0)]


def test_the_exponents_of_a_linear_and_a_quadratic_model(toys):
    found = profile(toys, LENGTHS, repeats=2, clock=Clock(), peak=cost)
    linear, quadratic = found["models"]
    for model, power in ((linear, 1), (quadratic, 2)):
        for key in ("training_ms", "prefill_ms", "training_mib", "prefill_mib"):
            fit = model["exponents"][key]
            assert fit["value"] == pytest.approx(power, abs=1e-9) and fit["high"] - fit["low"] < 1e-6, key
        assert model["prefill_ms"] == pytest.approx([float(length**power) for length in LENGTHS])
    assert linear["decoding_ms"] == pytest.approx([1.0] * 4) and linear["exponents"]["decoding_ms"]["value"] == pytest.approx(0, abs=1e-9)
    assert quadratic["decoding_ms"] == pytest.approx([2.0 * length + 16 for length in LENGTHS]), "16 tokens from L on, each time"
    assert quadratic["exponents"]["decoding_ms"]["value"] == pytest.approx(0.96, abs=0.03)
    assert linear["state_bytes"] == [8 + 2 * 4] * 4 and quadratic["state_bytes"] == [8 + 4 * length for length in LENGTHS]
    assert linear["exponents"]["state_bytes"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert not linear["compiled_decoding"] and linear["left_out_from"] is None and found["lengths"] == LENGTHS
    json.dumps(found, allow_nan=False)


def test_the_interval_is_that_of_students_t():
    """y = L^1.5 but for factors of 1, 2, 1 at L = 1, e, e^2: the slope stays, s^2 = 2/3 (log 2)^2 on one degree of freedom, t = 12.706."""
    lengths = [1.0, math.e, math.e**2]
    fit = exponent(lengths, [1.0, 2 * math.e**1.5, math.e**3])
    assert fit.value == pytest.approx(1.5)
    half = 12.7062 * math.sqrt(2 / 3 * math.log(2) ** 2 / 2)
    assert (fit.low, fit.high) == pytest.approx((1.5 - half, 1.5 + half), rel=1e-5)
    assert exponent([1, 4], [3.0, 6.0]) == (pytest.approx(0.5), None, None), "two points have no interval"
    assert exponent([1, 4, 16], [3.0, None, 12.0]).value == pytest.approx(0.5) and exponent([1, 4], [None, 1.0]) is None


def test_a_model_that_needs_too_much_is_left_out_from_there_on(toys):
    def peak(prepare):
        used = cost(prepare)
        return None if used > 100 else used  # the quadratic one at 512: 262

    found = profile(toys, LENGTHS, repeats=1, clock=Clock(), peak=peak)
    linear, quadratic = found["models"]
    assert quadratic["left_out_from"] == 512 and linear["left_out_from"] is None
    for key in PANELS:
        assert quadratic[key][3] is None and None not in quadratic[key][:3] and None not in linear[key]
    assert "quadratic: 512 tokens need more memory than there is" in notes(found)


def test_the_picture_has_a_colour_for_each_model_and_says_the_exponents(toys):
    found = profile(toys, LENGTHS, repeats=1, clock=Clock(), peak=cost)
    panels = growth(found).axes
    assert len(panels) == 6 and all(axes.get_xscale() == axes.get_yscale() == "log" for axes in panels)
    for axes in panels:
        fitted, points, *others = axes.lines
        assert fitted.get_color() == points.get_color() != others[0].get_color() == others[1].get_color()
        linear, quadratic = (text.get_text() for text in axes.get_legend().get_texts())
        assert linear.startswith("linear  $L^{") and quadratic.startswith("quadratic  $L^{")
    assert points.get_ydata().tolist() == [16 / 1024] * 4, "the state, in KiB"
    assert "$L^{2.00}$ ± 0.00" in panels[1].get_legend().get_texts()[1].get_text()
    prefill = panels[1].lines[2].get_ydata()  # the line of the quadratic one goes through its points
    assert prefill.tolist() == pytest.approx([float(length**2) for length in LENGTHS])
    cells = [list(column.cells) for column in table(found).columns]
    assert [cells[0][2], cells[1][2], cells[-1][2]] == ["prefill, ms", "linear", "1.00 ± 0.00"] and cells[-1][3] == "2.00 ± 0.00"
    found["models"] = found["models"][:1]
    growth(found).savefig(io.BytesIO())  # a single line that is level is no trouble


def test_one_command_measures_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--profile", "--model", "s4d,transformer", "--lengths", "8,32,16", "model.d_model=16", "--output", "here"]
    with ops.use():
        assert main(words) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "here" / "profile.json").read_text())
    assert found["lengths"] == [8, 16, 32] and [model["name"] for model in found["models"]] == ["s4d", "transformer"]
    s4d, transformer = found["models"]
    for model in found["models"]:
        for key in PANELS:
            assert len(model[key]) == 3 and all(value >= 0 for value in model[key])
        assert model["training_ms"][0] > model["decoding_ms"][0] > 0 and model["node"]["d_model"] == 16
    assert len(set(s4d["state_bytes"])) == 1 and transformer["exponents"]["state_bytes"]["value"] == pytest.approx(1, abs=0.05)
    assert (tmp_path / "here" / "profile.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "here" / "profile.svg").exists()
    assert "training, ms" in printed and "transformer" in printed and "written to here: profile.json" in printed


def test_a_model_without_a_state_is_trained_alone(toys, monkeypatch):
    monkeypatch.setattr(Toy, "causal", False)
    found = profile(toys[:1], [8, 16], repeats=1, clock=Clock(), peak=cost)
    (model,) = found["models"]
    assert model["prefill_ms"] == model["decoding_ms"] == model["prefill_mib"] == model["state_bytes"] == [None, None]
    assert model["left_out_from"] is None and model["training_ms"] == pytest.approx([8.0, 16.0])
    assert notes(found) == ["linear: 4 parameters; it has no state, so no prefill and no decoding"]


def test_a_model_too_short_for_the_lengths_is_one_sentence():
    found = subjects(["transformer"], ["model.max_len=20"], **small([16]))
    with pytest.raises(ConfigError, match="^transformer was built for 20 tokens; --lengths 16 needs 64 more than that$"):
        profile(found, [16])


# ---- what measures


def test_sides_are_timed_in_turn():
    order, clock = [], Clock()

    def side(name, seconds):
        order.append(name)
        Clock.now += seconds

    timings = in_turn({"slow": partial(side, "slow", 3.0), "fast": partial(side, "fast", 0.5)}, 4, budget=5.0, clock=clock)
    assert timings["slow"].ms == 3000 and timings["fast"].ms == 500 and timings["fast"].spread == 0
    assert order == ["slow", "fast"] * 3 + ["fast"] * 2, "the first warms up; the slow one has used up its budget after two"


def test_the_peak_of_a_process():
    def work(mebibytes):
        return lambda: torch.zeros(mebibytes << 18)  # floats

    small_one, large = (measuring.peak(lambda n=n: work(n)) for n in (16, 128))
    assert 16 <= small_one < 32 and 128 <= large < 144


def test_a_child_that_fails_and_one_that_is_killed(capfd):
    assert in_child(lambda: [os.getpid() != 0, 2.5]) == [True, 2.5]
    with pytest.raises(RuntimeError, match="failed there"):
        in_child(lambda: 1 // 0)
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert in_child(lambda: os.kill(os.getpid(), signal.SIGKILL)) is None  # as the system does when memory is short
    assert in_child(lambda: bytearray(1 << 60)) is None and in_child(lambda: torch.empty(1 << 60)[0]) is None
    with pytest.raises(RuntimeError, match="crashed there .SIGSEGV."):
        in_child(lambda: os.kill(os.getpid(), signal.SIGSEGV))
