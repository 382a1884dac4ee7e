"""H3, the gated MLP and Mamba, with every state space in their slots: against their definitions, and the properties of every model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import TINY
from hydra.utils import instantiate
from test_models import CONFIGS, compose_yaml, conform, random_tokens
from torch.nn import functional as F

from lab.analysis import conformance
from lab.config import ConfigError, check, compose
from lab.layers.hippo import eigenvalues
from lab.mixers import Attention, GatedMLP, H3Layer, MambaLayer, S4DLayer, S5Layer
from lab.models import Stack, create_model, initialise
from lab.models.create import LAYERS
from lab.training import train

SLOTTED = {"h3": partial(H3Layer, d_state=5), "gated_mlp": GatedMLP, "mamba": partial(MambaLayer, d_conv=3)}


def sequence(B: int = 2, L: int = 19, D: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(0)).to(dtype)


def random(layer):
    conformance.randomise(layer, 0)
    return layer.eval()


def filtered(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """x (B, L, D), taps (K, D), the last one for the present -> sum_k taps_k x_{t - K + 1 + k}"""
    K, L = len(taps), x.shape[1]
    padded = F.pad(x, (0, 0, K - 1, 0))
    return sum(taps[k] * padded[:, k : k + L] for k in range(K))


# Against the definitions


@torch.no_grad()
@pytest.mark.parametrize("d_head", [1, 2, 4])
def test_h3_by_its_definition(d_head):
    """A loop over time with a matrix per head, in double precision, from the parameters alone."""
    layer, x = random(H3Layer(8, d_head=d_head, d_state=6).double()), sequence(dtype=torch.float64)
    q, k, v = layer.in_proj(x).chunk(3, -1)
    k = filtered(k, layer.shift) + layer.D * k
    q, k, v = (t.unflatten(-1, (8 // d_head, d_head)) for t in (q, k, v))  # (B, L, H, d)
    ssm = layer.ssm
    A, C = torch.complex(-ssm.log_A_re.exp(), ssm.A_im), torch.view_as_complex(ssm.C[0])  # (H, n), those of a head
    decay = torch.exp(ssm.log_dt.exp()[:, None] * A)
    into = (decay - 1) / A
    h, ys = torch.zeros(2, 8 // d_head, d_head, d_head, 3, dtype=A.dtype), []
    for t in range(x.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None]  # (B, H, d, d)
        h = decay[:, None, None] * h + into[:, None, None] * kv[..., None]
        S = 2 * (C[:, None, None] * h).sum(-1).real + ssm.D[:, None, None] * kv
        ys.append(torch.einsum("bhi,bhij->bhj", q[:, t], S).flatten(1))
    want = layer.out_proj(torch.stack(ys, 1))
    torch.testing.assert_close(layer(x), want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(layer.float()(x.float()).double(), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_diagonal_state_space_of_h3_is_s4d_in_its_slot():
    one, x = random(H3Layer(8, d_state=6)), sequence()
    other = H3Layer(8, d_state=6, ssm_layer=partial(S4DLayer, d_state=6)).eval()
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    assert torch.allclose(H3Layer(8, d_state=6).ssm.A_im, eigenvalues("lin", 6).imag.float())


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_what_stands_around_a_slot(name):
    """Each formula with the layer in the slot as a function."""
    x, layers = sequence(), {what: random(make(8, ssm_layer=partial(LAYERS[name], d_state=4))) for what, make in SLOTTED.items()}
    h3, gated, mamba = layers.values()
    q, k, v = h3.in_proj(x).chunk(3, -1)
    k = filtered(k, h3.shift) + h3.D * k
    torch.testing.assert_close(h3(x), h3.out_proj(q * h3.ssm(k * v)), rtol=1e-4, atol=1e-5)
    a, b = F.silu(gated.in_proj(x)).chunk(2, -1)
    torch.testing.assert_close(gated(x), gated.out_proj(gated.ssm(a) * b), rtol=1e-4, atol=1e-5)
    u, z = mamba.in_proj(x).chunk(2, -1)
    u = F.silu(filtered(u, mamba.conv1d.weight[:, 0].T) + mamba.conv1d.bias)
    torch.testing.assert_close(mamba(x), mamba.out_proj(mamba.ssm(u) * F.silu(z)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("activation", "act"), [("silu", F.silu), ("gelu", F.gelu), ("relu", F.relu)])
def test_a_gated_mlp_alone(activation, act):
    """Every token by itself: nothing is mixed over time, and the layer says so."""
    layer, x = random(GatedMLP(8, activation=activation)), sequence()
    W, c = layer.in_proj.weight, layer.in_proj.bias
    assert W.shape == (64, 8)
    want = layer.out_proj(act(x @ W[:32].T + c[:32]) * act(x @ W[32:].T + c[32:]))
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer(x[:, 3:4]), want[:, 3:4])
    assert layer.init_state(2) == layer(x, want=("state",)).state == {}
    assert "mixes nothing over time" in repr(layer) and "nothing" not in repr(GatedMLP(8, ssm_layer=S4DLayer))


@torch.no_grad()
@pytest.mark.parametrize("d_head", [1, 2, 4])
def test_steps_equal_the_convolution(d_head):
    layer, x = H3Layer(16, d_head=d_head).eval(), sequence(L=100, D=16)
    want, state = layer(x), layer.init_state(2)
    for t in range(100):
        out = layer(x[:, t : t + 1], state, want=("state",))
        state = out.state
        torch.testing.assert_close(out.y[:, 0], want[:, t], rtol=1e-5, atol=1e-5)
    assert {name: tuple(t.shape) for name, t in (state | state["ssm"]).items() if name != "ssm"} == {
        "shift": (2, 63, 16),
        "h": (2, d_head**2, 16 // d_head, 32, 2),
    }


# What stands in a slot


def test_a_state_space_in_a_slot_is_alone():
    """So that no GELU and GLU come between; who wants them says so."""
    for make in SLOTTED.values():
        for layer in (S4DLayer, S5Layer, partial(S4DLayer, d_state=4)):
            assert not make(8, ssm_layer=layer).ssm.mixing
        assert make(8, ssm_layer=partial(S4DLayer, mixing=True)).ssm.mixing
        assert isinstance(make(8, ssm_layer=MambaLayer).ssm, MambaLayer)
    width = {name: make(8, ssm_layer=S4DLayer).ssm.D.shape[0] for name, make in SLOTTED.items()}
    assert width == {"h3": 8, "gated_mlp": 32, "mamba": 16}
    assert H3Layer(8, d_head=4, ssm_layer=S4DLayer).ssm.D.shape == (2,)


def test_mamba_with_a_slot_has_no_parameters_of_a_scan():
    scan = {"x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D"}
    names = {name for name, _ in MambaLayer(8).named_parameters()}
    inside = {name for name, _ in MambaLayer(8, ssm_layer=S4DLayer).named_parameters()}
    assert scan < names and {name for name in inside if not name.startswith("ssm.")} == names - scan
    assert MambaLayer(8, ssm_layer=S4DLayer).time_step_bias is None


def test_what_h3_starts_from():
    torch.manual_seed(0)
    layer = H3Layer(500, d_state=4)
    assert 0.45 < layer.shift.abs().max() <= 0.5 and abs(layer.shift.mean()) < 0.02
    assert abs(layer.D.mean()) < 0.15 and abs(layer.D.std() - 1) < 0.1


@pytest.mark.parametrize(
    ("make", "arguments", "told"),
    [
        (H3Layer, {"d_head": 3}, "H3Layer: d_model=8 must be a multiple of d_head=3"),
        (H3Layer, {"d_head": 0}, "H3Layer: d_head=0 must be at least 1"),
        (H3Layer, {"d_state": 0}, "H3Layer: d_state=0 must be at least 1"),
        (H3Layer, {"d_state": 3}, "d_state=3 counts states in conjugate pairs: it must be even and at least 2"),
        (GatedMLP, {"expand_factor": 0}, "GatedMLP: expand_factor=0 must be at least 1"),
        (GatedMLP, {"activation": "swish"}, "GatedMLP: activation='swish'; expected silu, gelu, relu"),
    ],
)
def test_arguments_that_cannot_be(make, arguments, told):
    with pytest.raises(ValueError) as error:
        make(8, **arguments)
    assert str(error.value) == told


@pytest.mark.parametrize("make", SLOTTED.values())
def test_a_slot_that_reads_the_future(make):
    layer, x = make(8, ssm_layer=partial(S4DLayer, d_state=4, bidirectional=True)), sequence()
    changed = torch.cat([x[:, :-1], x[:, -1:] + 1], 1)
    assert not torch.allclose(layer(x)[:, 0], layer(changed)[:, 0]) and not layer.causal
    padded = layer(torch.cat([x, 9 * x], 1), lengths=torch.tensor([19, 19]))[:, :19]
    torch.testing.assert_close(padded, layer(x))
    for call in (partial(layer, x, want=("state",)), partial(layer.init_state, 2)):
        with pytest.raises(NotImplementedError, match=f"^{type(layer).__name__} reads the whole sequence, the future too"):
            call()


@torch.no_grad()
def test_any_mixer_fits_even_one_whose_state_grows():
    """Attention between H3's projections: the cache is reserved through the slot, and generation writes into it."""
    model = Stack(11, 8, 1, partial(H3Layer, d_head=2, d_state=2, ssm_layer=partial(Attention, n_heads=2)), position="none").eval()
    initialise(model, 0)
    prompt = random_tokens(2, 3)
    tokens = model.generate(prompt, 5, temperature=0.0)
    for t in range(3, 8):
        assert torch.equal(model(tokens[:, :t])[:, -1].argmax(-1), tokens[:, t])


# The properties of every model


COMBINATIONS = {(name, ssm_layer) for name in SLOTTED for ssm_layer in (None, *LAYERS)}
OF_YAML = {("h3", None), ("mamba", None), ("mamba", "mamba"), ("gated_mlp", "s4d")}  # in test_models.py


@pytest.mark.parametrize(("name", "ssm_layer"), sorted(COMBINATIONS - OF_YAML, key=str))
def test_every_combination_conforms(name, ssm_layer):
    small = {"h3": {"d_head": 2}, "gated_mlp": {"expand_factor": 1}, "mamba": {}}[name]
    conform(lambda: create_model(name, ssm_layer, 8, 4, 1, vocab_size=11, architecture_kwargs=small))


def test_heads_conform_across_the_borders_of_chunks():
    model = create_model("h3", d_model=8, d_state=6, num_layers=1, vocab_size=11, architecture_kwargs={"d_head": 2})
    initialise(model, 0)
    conformance.randomise(model, 0)
    conformance.check_borders(model, random_tokens(3, 260), (15, 16, 17, 128, 255, 256, 257))


@pytest.mark.parametrize("make", [partial(H3Layer, d_head=2, d_state=2), *(partial(make, ssm_layer=S5Layer) for make in SLOTTED.values())])
def test_double_precision_and_autocast(make):
    layer, x = make(4), sequence(L=5, D=4)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, want=("state",))
    torch.testing.assert_close(out.y.float(), want, rtol=0.05, atol=0.05)
    assert all(t.dtype == torch.float32 for t in torch.utils._pytree.tree_leaves(out.state))
    out.y.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    random(layer.double())
    assert torch.autograd.gradcheck(layer, x.double().requires_grad_(), eps=1e-6, atol=1e-8, rtol=1e-6)
    assert {t.dtype for t in torch.utils._pytree.tree_leaves(layer.init_state(2))} == {torch.float64}


# By the config


def mixer_of(*words: str) -> dict:
    composed = compose(list(words))
    check(composed)
    return composed.config["model"]["mixer"]


def test_a_slot_is_filled_by_one_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mixer_of("model=h3")["ssm_layer"] is None
    assert mixer_of("model=gated_mlp")["ssm_layer"]["_target_"] == "lab.mixers.S4DLayer"
    assert mixer_of("model=gated_mlp", "ssm_layer=none")["ssm_layer"] is None
    for model in ("gated_mlp", "mamba", "h3_tiny"):
        slot = mixer_of(f"model={model}", "ssm_layer=s5", "model.mixer.ssm_layer.blocks=2")["ssm_layer"]
        assert (slot["_target_"], slot["blocks"], slot["mixing"]) == ("lab.mixers.S5Layer", 2, False)
    slot = mixer_of("model=h3_attention", "ssm_layer@model.mixer.h3.ssm_layer=mamba")["h3"]["ssm_layer"]
    assert (slot["_target_"], slot["n_layers"]) == ("lab.mixers.MambaLayer", 6)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text("defaults: [override /model: h3, override /ssm_layer: s5]")
    assert mixer_of("experiment=mine")["ssm_layer"]["_target_"] == "lab.mixers.S5Layer"


def test_attention_stands_where_the_paper_has_it():
    """In the second layer, and in number 2 + n / 2."""
    model = instantiate(compose_yaml("h3_attention", "model.d_model=8", "task.vocab_size=11").model)
    assert [i + 1 for i, mixer in enumerate(model.mixers) if isinstance(mixer, Attention)] == [2, 5]


def test_a_slot_takes_what_create_model_takes():
    assert {*LAYERS, "none"} == {path.stem for path in (CONFIGS / "ssm_layer").glob("*.yaml")}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ssm_layer=s5d"], "ssm_layer=s5d (command line): there is no such option; did you mean s5? (mamba, none, s4, s4d, s5)"),
        (["ssm_layer=lattice"], "ssm_layer=lattice (command line): there is no such option; options: mamba, none, s4, s4d, s5"),
        (["ssm_layr=s5"], "ssm_layr (command line): there is no such key; did you mean ssm_layer?"),
        (["ssm_layer=null"], "ssm_layer=null (command line): ssm_layer takes the name of one option: mamba, none, s4, s4d, s5"),
        (
            ["model.mixer.ssm_layer=s5"],
            "model.mixer.ssm_layer (command line): expected a node with _target_ and `_partial_: true` (of a Mixer) or null, got 's5'; "
            "an option is chosen by ssm_layer=s5, in a file by `override /ssm_layer: s5`",
        ),
        (
            ["ssm_layer=s5", "model.mixer.ssm_layer.d_stat=8"],
            "model.mixer.ssm_layer.d_stat (command line): lab.mixers.S5Layer has no such argument; "
            "did you mean model.mixer.ssm_layer.d_state?",
        ),
        (
            ["model=h3_attention", "ssm_layer=s5"],
            "ssm_layer=s5 (command line): no defaults list has ssm_layer; did you mean ssm_layer@model.mixer.h3.ssm_layer=s5?",
        ),
        (
            ["model=lot", "ssm_layer=s5"],
            "ssm_layer=s5 (command line): no defaults list has ssm_layer: nothing that is chosen has a place for it",
        ),
        (
            ["model.mixer.d_hed=2"],
            "model.mixer.d_hed (command line): lab.mixers.H3Layer has no such argument; did you mean model.mixer.d_head?",
        ),
    ],
)
def test_mistakes_are_told(words, sentence):
    with pytest.raises(ConfigError) as error:
        mixer_of("model=h3", *words)
    assert str(error.value) == sentence


SHORT = [*(word for word in TINY if "n_heads" not in word and "mixer.dropout" not in word), "trainer.max_steps=2", "trainer.val_every=2"]


def test_a_slot_that_reads_the_future_is_refused_where_the_next_token_is_the_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        train(compose([*SHORT, "model=h3", "ssm_layer=s4d", "model.mixer.ssm_layer.bidirectional=true"]))
    assert str(error.value) == (
        "model.mixer.ssm_layer.bidirectional (command line): the model reads the future, and task CopyReverse predicts the next token; "
        "it must be false"
    )


def test_what_stands_in_a_slot_is_watched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    watched = [word for word in SHORT if "state_spaces" not in word]
    run = train(compose([*watched, "model=h3", "callbacks.state_spaces.interval=2", "run_dir=run"]))
    assert len(list((run.path / "state_spaces").glob("*.npz"))) == 2


@torch.no_grad()
def test_what_is_recorded_of_a_head_is_what_its_first_entry_sees():
    """With rows and tokens as they are, however many sequences the state space really runs over."""
    layer, x = random(H3Layer(8, d_head=2, ssm_layer=MambaLayer)), sequence()
    record = layer(x, want=("record",)).record
    assert {name: tuple(t.shape) for name, t in record.items()} == {
        "eigenvalues": (8, 16, 2), "dt": (2, 19, 8, 1), "B": (2, 19, 16), "C": (2, 19, 16),
    }  # fmt: skip
    q, k, v = layer.in_proj(x).chunk(3, -1)
    k = filtered(k, layer.shift) + layer.D * k
    want = layer.ssm(k[..., ::2] * v[..., ::2], want=("record",)).record
    torch.testing.assert_close(record["dt"], want["dt"])
    kernel = GatedMLP(8, ssm_layer=S4DLayer)(x, want=("record",)).record["kernel"]
    assert kernel.shape == (1, 32, 19)
