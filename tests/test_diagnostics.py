"""Diagnostics of state spaces: what the layers record is what they do, and what is logged, stored and drawn is what they recorded."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, rows, tensors
from test_monitoring import events
from torch.nn import functional as F

from lab.analysis import plot_responses, plot_selectivity, plot_spectrum, plot_time_steps, state_space_plots
from lab.analysis.snapshots import read_snapshot, snapshot_steps
from lab.analysis.state_spaces import DT_EDGES, decay, discrete, memory, selective_responses, two_sided
from lab.config import compose, first_difference
from lab.mixers import Attention, Lattice, MambaLayer, Mixer, Output, S4DLayer, S4Layer, S5Layer
from lab.models import Stack, initialise
from lab.ops import selective_scan
from lab.tasks import Batch
from lab.training import monitoring, train
from lab.training.monitoring import CHANNELS, StateSpaces

D, L = 6, 12
LAYERS = [
    lambda: S4DLayer(D, d_state=8),
    lambda: S4DLayer(D, d_state=8, bidirectional=True, rate=2.0),
    lambda: S5Layer(D, d_state=8, blocks=2),
    lambda: S5Layer(D, d_state=8, bidirectional=True),
    lambda: MambaLayer(D, d_state=4),
    lambda: S4Layer(D, d_state=8),
    lambda: S4Layer(D, d_state=8, init_method="legt", bidirectional=True),
]
WORDS = (
    *(word for word in TINY if not word.startswith("model.mixer.") and word != "~callbacks.state_spaces"),
    "callbacks.state_spaces.interval=4", "callbacks.state_spaces.samples=3", "model.n_layers=2", "run_dir=run",
)  # fmt: skip
PICTURES = ["watch_state_spaces/dt", "watch_state_spaces/responses", "watch_state_spaces/spectrum"]


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """watched(model, *overrides) trains a tiny model with the callback, in the folder `run` of an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return lambda model, *overrides: train(compose([f"model={model}", *WORDS, *overrides]))


# What a layer records


@torch.no_grad()
@pytest.mark.parametrize("make", LAYERS)
def test_recording_changes_nothing(make):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(3, L, D)
    for lengths in (None, torch.tensor([L, 3, 7])):
        out = layer(x, lengths=lengths, want=("record",))
        assert torch.equal(out.y, layer(x, lengths=lengths)) and not layer(x, want=("losses",)).record
    if not getattr(layer, "bidirectional", False):
        _, state, *_ = layer(x[:, :5], want=("state",))
        assert torch.equal(layer(x[:, 5:], state, want=("record",)).y, layer(x[:, 5:], state))


@torch.no_grad()
def test_recorded_eigenvalues_are_those_of_the_formulas():
    x = torch.zeros(1, L, D)
    lin = S4DLayer(D, d_state=8, init_method="lin", rate=3.0, dt_min=0.01, dt_max=0.02)(x, want=("record",)).record
    A = torch.view_as_complex(lin["eigenvalues"])
    torch.testing.assert_close(A, torch.complex(torch.full((D, 4), -0.5), math.pi * torch.arange(4.0).expand(D, 4)))
    assert lin["dt"].shape == (D, 1) and lin["dt"].min() >= 0.03 and lin["dt"].max() <= 0.06  # the rate is in it
    s5 = S5Layer(D, d_state=8, init_method="lin")(x, want=("record",)).record
    torch.testing.assert_close(torch.view_as_complex(s5["eigenvalues"]), A[:1])
    assert s5["dt"].shape == (1, 4)
    mamba = MambaLayer(D, d_state=4)(x, want=("record",)).record
    torch.testing.assert_close(mamba["eigenvalues"][..., 0], -torch.arange(1.0, 5).expand(2 * D, 4))
    assert not mamba["eigenvalues"][..., 1].any() and mamba["dt"].shape == (1, L, 2 * D, 1) and mamba["B"].shape == (1, L, 4)
    z = torch.from_numpy(discrete(lin["eigenvalues"].numpy(), lin["dt"].numpy()))
    torch.testing.assert_close(z, torch.exp(lin["dt"] * A))


def before_gelu(layer, x, monkeypatch):
    """y (B, L, D) of S4, S4D and S5, whose output goes on through GELU and a gate."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(F, "gelu", lambda y: seen.append(y) or y)
        layer(x)
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("make", [*LAYERS[:4], *LAYERS[5:]])
def test_the_kernel_is_the_answer_to_an_impulse(make, monkeypatch):
    """An impulse at token s in each channel, one channel in each row; bidirectional layers answer before it as well."""
    torch.manual_seed(0)
    layer = make()
    for s in (0, 4):
        x = torch.zeros(D, L, D)
        x[range(D), s, range(D)] = 1
        kernel = layer(x, want=("record",)).record["kernel"]
        y = before_gelu(layer, x, monkeypatch)[range(D), :, range(D)]  # (D, L)
        y[:, s] -= layer.D
        both = torch.from_numpy(two_sided(kernel.numpy()))
        assert both.shape == (D, 2 * L - 1 if layer.C.shape[0] == 2 else L)
        zero = both.shape[1] - L
        torch.testing.assert_close(y[:, s:], both[:, zero : zero + L - s], rtol=1e-4, atol=1e-6)
        if zero:
            torch.testing.assert_close(y[:, :s], both[:, zero - s : zero], rtol=1e-4, atol=1e-6)
        else:
            assert y[:, :s].abs().max() < 1e-6 if s else True


@torch.no_grad()
def test_mambas_responses_are_those_of_its_scan():
    """At each token s: the scan of a unit impulse, with the dt, B and C that the layer made of its own input."""
    torch.manual_seed(0)
    layer = MambaLayer(D, d_state=4)
    record = layer(3 * torch.randn(1, L, D), want=("record",)).record
    A, dt, B, C = record["eigenvalues"], record["dt"][..., 0], record["B"], record["C"]
    at = np.array([0, 3, 11])
    got = selective_responses(A.numpy(), dt[0].numpy(), B[0].numpy(), C[0].numpy(), at)
    for k, s in enumerate(at):
        u = torch.zeros(1, L, 2 * D)
        u[:, s] = 1
        y, _ = selective_scan(u, dt, A[..., 0], B, C, torch.zeros(2 * D))
        torch.testing.assert_close(torch.from_numpy(got[:, k]), y[0], rtol=1e-4, atol=1e-7)
        assert not got[:s, k].any() and got[s, k].any()


def test_memory_and_decay():
    A = np.array([[[-1.0, 0.0], [-4.0, 2.0]]])  # one channel, two states
    np.testing.assert_allclose(memory(A, np.array([[0.5]])), [[2, 0.5]])
    np.testing.assert_allclose(abs(discrete(A, np.array([[0.5]]))), np.exp(-1 / memory(A, np.array([[0.5]]))))
    assert memory(A, np.zeros((1, 1))).tolist() == [[np.inf, np.inf]]
    dt = np.array([[0.1], [3.0]])
    np.testing.assert_allclose(decay(A[:, :1], dt), np.exp(-dt))  # one state with A = -1
    np.testing.assert_allclose(decay(A, dt), (np.exp(-dt) + np.exp(-4 * dt)) / 2)


# What a run logs and stores


@pytest.mark.parametrize("model", ["s4d", "s5", "mamba"])
def test_what_is_seen_and_when(watched, model):
    run = watched(model, "model.mixer.d_state=8")
    assert list(snapshot_steps("run", "state_spaces")) == [0, 4, 8, 12]
    (first,) = (row for row in rows("run") if row["step"] == 0 and "watch_state_spaces/median_dt_layer_1" in row)
    stored = read_snapshot("run", "state_spaces", 0)
    assert list(stored["layers"]) == [0, 1] and stored["tokens"].shape == (8,) and stored["labels"][0] == str(stored["tokens"][0])
    channels = {"s4d": 16, "s5": 1, "mamba": CHANNELS}[model]  # S5: all channels share the states
    assert stored["eigenvalues_1"].shape == (channels, 8 if model == "mamba" else 4, 2)
    kept = memory(stored["eigenvalues_1"], stored["dt_1"])  # the first and the last channel by dt are among the stored ones
    assert first["watch_state_spaces/longest_memory_layer_1"] == pytest.approx(kept.max(), rel=1e-5)
    assert first["watch_state_spaces/shortest_memory_layer_1"] == pytest.approx(kept.min(), rel=1e-5)
    assert first["watch_state_spaces/largest_eigenvalue_layer_1"] == pytest.approx(math.exp(-1 / kept.max()), rel=1e-5)
    assert 1e-3 <= first["watch_state_spaces/median_dt_layer_1"] <= 1e-1
    count, middle = stored["dt_counts_1"], np.log10(first["watch_state_spaces/median_dt_layer_1"])
    assert count.sum() == {"s4d": 16, "s5": 4, "mamba": 3 * 8 * 32}[model]  # channels, states, samples x tokens x channels
    place = np.searchsorted(DT_EDGES, middle)
    assert count[: place - 1].sum() <= count.sum() / 2 <= count[: place + 1].sum()
    if model == "mamba":
        assert stored["token_dt_0"].shape == (8, CHANNELS) and stored["B_0"].shape == stored["C_0"].shape == (8, 8)
        assert 0 < first["watch_state_spaces/dt_spread_layer_0"] < 1
    else:
        assert stored["kernel_0"].shape == (1, 16, 8) and "token_dt_0" not in stored
        assert "watch_state_spaces/dt_spread_layer_0" not in first
    shown = events(run)
    assert shown["scalars"]["watch_state_spaces/median_dt_layer_0"] == [0, 4, 8, 12]
    pictures = [*PICTURES, *(["watch_state_spaces/selectivity"] if model == "mamba" else [])]
    assert shown["images"] == dict.fromkeys(pictures, [0, 4, 8, 12])
    assert set(shown["histograms"]) == {"watch_state_spaces/log10_dt_layer_0", "watch_state_spaces/log10_dt_layer_1"}


def test_training_does_not_notice(watched):
    one = watched("mamba", "run_dir=watched")
    other = watched("mamba", "~callbacks.state_spaces", "run_dir=plain")
    expected, got = tensors(other.last), tensors(one.last)
    assert expected.keys() == got.keys() and [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert one.hparams()["config_hash"] == other.hparams()["config_hash"] and first_difference(one.config(), other.config()) is None


def test_a_model_without_state_spaces_is_left_alone(watched):
    watched("lot", "model.mixer.n_heads=2", "trainer.max_steps=1", "trainer.val_every=1")
    assert not snapshot_steps("run", "state_spaces") and not any("watch_state_spaces" in name for row in rows("run") for name in row)


def test_it_is_on_by_default_and_cleared(watched):
    assert compose(["model=mamba"]).config["callbacks"]["state_spaces"]["interval"] == 500
    run = watched("s5", "trainer.max_steps=1", "trainer.val_every=1")
    assert (run.path / "state_spaces").exists()
    watched("s5", "trainer.max_steps=1", "trainer.val_every=1", "callbacks.state_spaces.interval=null", "fresh=true")
    assert not (run.path / "state_spaces").exists()


def test_a_long_input_of_many_channels_does_not_fill_the_memory(watched, monkeypatch, capsys):
    monkeypatch.setattr(monitoring, "LIMIT", 2 * 4 * 2 * 8 * 32)  # dt of two rows in two layers
    watched("mamba", "trainer.max_steps=1", "trainer.val_every=1")
    assert "monitoring looks at 2 of 3 rows, 8 of their 8 tokens" in capsys.readouterr().out
    assert read_snapshot("run", "state_spaces")["dt_counts_0"].sum() == 2 * 8 * 32
    monkeypatch.setattr(monitoring, "LIMIT", 4 * 2 * 5 * 32)
    watched("mamba", "trainer.max_steps=1", "trainer.val_every=1", "fresh=true")
    assert "monitoring looks at 1 of 3 rows, 5 of their 8 tokens" in capsys.readouterr().out
    assert read_snapshot("run", "state_spaces")["token_dt_0"].shape == (5, CHANNELS)


class Named(Mixer):
    """A user's mixer that records names of ours, and not the rest."""

    def mix(self, x, state, lengths, want):
        return Output(x, record={"eigenvalues": torch.zeros(1, 1, 2), "dt": torch.ones(1, 1)})


def look(callback, model, batch, tmp_path, **more):
    """One look of a callback at a model, without a run."""
    values = {"prompt_len": None, "text": False, "split": lambda name: SimpleNamespace(batch=lambda rows: batch, __len__=None)} | more
    logged = {}
    logger = SimpleNamespace(log_metrics=lambda scalars, step: logged.update(scalars))
    trainer = SimpleNamespace(
        global_step=7, default_root_dir=tmp_path, loggers=[logger], precision_plugin=SimpleNamespace(forward_context=torch.no_grad)
    )
    callback.batch = batch
    callback.show(trainer, SimpleNamespace(**values), monitoring.record_of(trainer, model, batch))
    return logged


def mixed(*makes):
    queue = list(makes)
    model = Stack(11, D, len(makes), lambda d_model: queue.pop(0)(), max_len=L)
    initialise(model, 0)
    return model


TOKENS = torch.randint(3, 11, (2, L), generator=torch.Generator().manual_seed(0))


def test_layers_keep_their_numbers_in_a_mixed_stack(tmp_path):
    model = mixed(lambda: Attention(D, 2), LAYERS[1], Named, lambda: Lattice(D, 2), LAYERS[4], LAYERS[2])
    logged = look(StateSpaces(), model, Batch(TOKENS, TOKENS), tmp_path)
    assert {name[-1] for name in logged} == {"1", "4", "5"} and "watch_state_spaces/dt_spread_layer_4" in logged
    stored = read_snapshot(tmp_path, "state_spaces")
    assert list(stored["layers"]) == [1, 4, 5] and stored["kernel_1"].shape == (2, D, L) and stored["token_dt_4"].shape == (L, 2 * D)
    assert [text.get_text() for text in plot_spectrum(tmp_path).axes[0].texts] == ["layer 1", "layer 5"]
    assert plot_responses(tmp_path).axes[2].get_xlabel() == "impulse at token s"
    logged = look(monitoring.Attention(maps=True), model, Batch(TOKENS, TOKENS), tmp_path)
    assert {name.split("_")[3] for name in logged} == {"0", "3"} and list(read_snapshot(tmp_path, "attention")["layers"]) == [0, 3]
    look(monitoring.Phases(), model, Batch(TOKENS, TOKENS), tmp_path)
    assert list(read_snapshot(tmp_path, "phases")["layers"]) == [3]
    from lab.analysis import plot_attention, plot_delimiter_wave

    assert "layer 3" in plot_delimiter_wave(tmp_path).get_suptitle() == plot_delimiter_wave(tmp_path, layer=3).get_suptitle()
    assert [label.get_text() for label in plot_attention(tmp_path).axes[0].get_yticklabels()] == ["layer 0", "layer 3"]


def test_padding_and_text(tmp_path):
    """dt of padding counts nowhere; the first row is shown without its padding, its tokens as text."""
    model = mixed(LAYERS[4])
    batch = Batch(TOKENS, TOKENS, torch.tensor([5, 3]))
    logged = look(StateSpaces(), model, batch, tmp_path, text=True, decode=lambda tokens: "\n" if tokens == [3] else chr(90 + tokens[0]))
    dt = model(TOKENS, want=("record",)).record["dt"][0].detach()
    real = torch.cat([dt[0, :5], dt[1, :3]])
    assert logged["watch_state_spaces/median_dt_layer_0"] == pytest.approx(float(real.median()))
    assert logged["watch_state_spaces/dt_spread_layer_0"] == pytest.approx(float(real.log().std(0, correction=0).mean()), rel=1e-5)
    stored = read_snapshot(tmp_path, "state_spaces")
    assert stored["tokens"].shape == (5,) and stored["token_dt_0"].shape == (5, 2 * D)
    under = [text.get_text() for text in plot_selectivity(tmp_path).axes[0].texts[-5:]]
    assert under == ["↵" if token == 3 else chr(90 + token) for token in TOKENS[0, :5].tolist()]


def test_weights_that_are_not_finite_are_left_out(tmp_path):
    model = mixed(LAYERS[4], LAYERS[0])
    model.mixers[0].A_log.data[0, 0] = math.nan
    logged = look(StateSpaces(), model, Batch(TOKENS, TOKENS), tmp_path)
    assert all(name.endswith("layer_1") for name in logged) and list(read_snapshot(tmp_path, "state_spaces")["layers"]) == [1]
    plot_spectrum(tmp_path)


# What is drawn


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The snapshot of step 7 of a mixed stack: S4D, S5, Mamba, Mamba."""
    folder = tmp_path_factory.mktemp("stored")
    model = mixed(LAYERS[0], LAYERS[2], LAYERS[4], LAYERS[4])
    look(StateSpaces(), model, Batch(TOKENS, TOKENS), folder, prompt_len=4)
    return folder


def test_the_spectrum(stored):
    snapshot = read_snapshot(stored, "state_spaces")
    top, bottom, rates, memories, bar = plot_spectrum(stored).axes
    A, dt = snapshot["eigenvalues_0"], snapshot["dt_0"]
    z = discrete(A, dt)
    np.testing.assert_allclose(bottom.collections[0].get_offsets(), np.stack([z.real, z.imag], -1).reshape(-1, 2), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.sinh(top.collections[0].get_offsets()[:, 1]), A[..., 1].ravel(), rtol=1e-4)
    assert all(np.hypot(*(line.get_data())).max() == pytest.approx(1) for line in bottom.lines[:1])
    lines = np.array(memories.collections[1].get_segments())
    np.testing.assert_allclose(10 ** lines[..., 1], memory(snapshot["eigenvalues_3"], snapshot["dt_3"]), rtol=1e-4)
    assert memories.collections[1].get_colors().shape[0] == 2 * D and rates.get_ylabel() == "-A (1 / time)"
    assert bar.get_ylabel() == "dt (time per token)" and "step 7" in plot_spectrum(stored).get_suptitle()
    assert len(plot_spectrum(stored, layers=[1]).axes) == 3


def test_the_time_steps(stored):
    (axes,) = plot_time_steps(stored).axes
    snapshot = read_snapshot(stored, "state_spaces")
    for row, patch in enumerate(axes.patches):
        values, edges, _ = patch.get_data()
        count = snapshot[f"dt_counts_{row}"]
        np.testing.assert_allclose((row - values) / 0.9, count / count.max())
        np.testing.assert_allclose(edges, DT_EDGES)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer 0", "layer 1", "layer 2", "layer 3"]


def test_the_selectivity_map(stored):
    snapshot = read_snapshot(stored, "state_spaces")
    axes, first, second = plot_selectivity(stored, layers=[3], tokens=(2, 9)).axes
    picture = axes.images[0].get_array()
    c = 2 * D
    dt = snapshot["token_dt_3"][2:9]
    ratio, stays = np.log10(dt / snapshot["dt_3"][:, 0]), decay(snapshot["eigenvalues_3"], dt)
    most = max(math.log10(2), abs(ratio).max())
    cmap = state_space_plots.ScalarMappable(state_space_plots.Normalize(-most, most), "RdBu_r")
    np.testing.assert_allclose(picture[:c], cmap.to_rgba(ratio.T))
    np.testing.assert_allclose(picture[-c:], state_space_plots.ScalarMappable(state_space_plots.Normalize(0, 1), "magma").to_rgba(stays.T))
    assert axes.lines[0].get_xdata() == [3, 3]  # the delimiter
    assert [text.get_text() for text in axes.texts[2:]] == list(snapshot["labels"][2:9])
    assert len(plot_selectivity(stored).axes[0].get_yticks()) == 8


def test_the_responses(stored):
    snapshot = read_snapshot(stored, "state_spaces")
    kernels, _, maps, _ = plot_responses(stored).axes
    drawn = kernels.images[0].get_array()
    kernel = snapshot["kernel_0"][0]
    np.testing.assert_allclose(drawn[:D, :L], kernel / abs(kernel).max(1, keepdims=True), rtol=1e-5)
    assert np.ma.getmaskarray(drawn)[:, L].all()  # the gap before the next layer
    at = np.arange(L)
    sizes = abs(selective_responses(*(snapshot[f"{name}_2"] for name in ("eigenvalues", "token_dt", "B", "C")), at)).mean(-1)
    drawn = maps.images[0].get_array()[:L, :L]
    below = np.tri(L, dtype=bool)
    np.testing.assert_allclose(np.asarray(drawn)[below] ** 2, (sizes / sizes.max())[below], rtol=1e-4, atol=1e-7)
    assert np.ma.getmaskarray(drawn)[~below].all()


def test_many_layers_are_summed_up(tmp_path):
    look(StateSpaces(), mixed(*[LAYERS[0]] * 8), Batch(TOKENS, TOKENS), tmp_path)
    figure = plot_spectrum(tmp_path)
    assert figure.get_suptitle().endswith("6 of 8 layers")
    assert [text.get_text() for text in figure.axes[0].texts] == [f"layer {i}" for i in (0, 1, 3, 4, 6, 7)]
    assert len(plot_responses(tmp_path, layers=range(8)).axes[0].texts) == len(plot_time_steps(tmp_path).axes[0].patches) == 8


def test_mistakes_are_sentences(stored, tmp_path):
    from lab.training import RunError

    with pytest.raises(RunError, match="no snapshots in state_spaces/; callbacks.state_spaces.interval writes them, for models"):
        plot_spectrum(tmp_path)
    with pytest.raises(RunError, match=r"layers: the snapshot has no layer 4 to draw; there are 0, 1, 2, 3"):
        plot_responses(stored, layers=[4])
    with pytest.raises(RunError, match=r"layers: the snapshot has no layer 0 to draw; there are 2, 3"):
        plot_selectivity(stored, layers=[0])
    with pytest.raises(RunError, match=r"tokens=\(9, 9\): the snapshot has the tokens 0 to 11"):
        plot_selectivity(stored, tokens=(9, 9))
    look(StateSpaces(), mixed(LAYERS[0]), Batch(TOKENS, TOKENS), tmp_path)
    with pytest.raises(RunError, match="the snapshot has no selective layers: callbacks.state_spaces stores dt per token of Mamba"):
        plot_selectivity(tmp_path)


@pytest.mark.parametrize("plot", [plot_spectrum, plot_time_steps, plot_selectivity, plot_responses])
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_plot_is_saved(stored, plot, ending, tmp_path):
    plot(stored, output=tmp_path / f"plot.{ending}")
    assert (tmp_path / f"plot.{ending}").stat().st_size > 5000
