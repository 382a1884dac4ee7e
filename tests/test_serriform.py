"""SerriformNet: against its definition in double precision, with every part switched on and off, and as it is documented."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from conftest import TINY
from export_checks import at_once, check, export  # noqa: F401 (a fixture)
from hydra.utils import instantiate
from test_models import V, compose_yaml, conform, random_tokens
from torch.nn import functional as F

from lab.analysis import conformance, plot_receptive_field, receptive_field
from lab.layers import angles
from lab.mixers import Attention, Serriform
from lab.models import SerriformNet, Stack, initialise

FUNCTIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def make(
    dim: int = 8, num_layers: int = 2, max_seq_len: int | None = 24, dropout: float = 0.0, seed: int | None = 0, **config
) -> SerriformNet:
    model = SerriformNet(V, dim, num_layers, max_seq_len, dropout, config)
    if seed is not None:
        initialise(model, 0)
        conformance.randomise(model, seed)
    return model.eval()


# Every combination of parts; of layer 1 the convolution reaches over 3 * 4 tokens, more than the 9 of these checks


NAMES = "use_conv", "use_recurrence", "use_moe", "use_lowrank_ff"
PARTS = [dict(zip(NAMES, on, strict=True)) for on in itertools.product((True, False), repeat=4)]
COMBINATIONS = [{"topology": "sequential", "rope_mode": ("gate", "rotate")[i % 2], **parts} for i, parts in enumerate(PARTS)]
COMBINATIONS += [  # one part alone has nothing beside it
    {"topology": "parallel", "rope_mode": ("rotate", "gate")[i % 2], **parts}
    for i, parts in enumerate(PARTS)
    if parts["use_conv"] and parts["use_recurrence"]
]
FAR = {"conv_kernel_size": 4, "conv_dilation_growth": 4.0}
SMALL = {"d_ff": 8, "n_experts": 3}


@pytest.mark.parametrize("config", COMBINATIONS, ids=lambda c: "-".join(str(v)[:5] for v in c.values()))
def test_every_combination_conforms(config):
    mixes = config["use_conv"] or config["use_recurrence"]
    conform(partial(make, seed=None, allow_no_time_mixing=not mixes, **FAR, **config))


@torch.no_grad()
def test_one_part_alone_is_the_same_beside_and_behind():
    for parts in ({"use_conv": False}, {"use_recurrence": False}):
        one, other = make(**parts), make(topology="parallel", **parts)
        assert torch.equal(one(random_tokens()), other(random_tokens()))
    assert not torch.allclose(make()(random_tokens()), make(topology="parallel")(random_tokens()))


# The definition


def by_definition(model: SerriformNet, tokens: torch.Tensor, rope_mode: str, topology: str, conv: str, feed: str) -> torch.Tensor:
    """All of the model from its parameters, a loop over time for each thing that time enters."""
    p = dict(model.named_parameters())

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", torch.zeros(()))

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"]

    z = linear("position.input", p["embedding.weight"][tokens])
    B, L, D = z.shape
    w = 10_000.0 ** (-torch.arange(D // 2, dtype=torch.float64) / (D // 2))
    rows = []
    for t in range(L):
        if rope_mode == "gate":
            wave = torch.cos(torch.cat([t * w, t * w]) + p["position.phi"])
            rows.append(z[:, t] * (1 + p["position.gamma"] * wave))
        else:
            pairs = torch.complex(z[:, t, : D // 2], z[:, t, D // 2 :]) * torch.exp(1j * t * w)
            rows.append(torch.cat([pairs.real, pairs.imag], -1))
    x = torch.stack(rows, 1)
    for i in range(len(model.blocks)):
        name = f"blocks.{i}.mixer"
        n, taps, dilation = norm(f"blocks.{i}.norm1", x), p[f"{name}.taps"], (1, 2, 6)[i % 3]  # int(2.5 ** i)
        K, rows = len(taps), []
        for t in range(L):
            seen = [taps[k] * n[:, t - (K - 1 - k) * dilation] for k in range(K) if t >= (K - 1 - k) * dilation]
            rows.append(sum(seen))
        c = FUNCTIONS[conv](linear(f"{name}.pointwise", torch.stack(rows, 1)))
        alpha, beta = torch.exp(-torch.log1p(torch.exp(p[f"{name}.rho"]))), p[f"{name}.beta"]
        source, M = (n if topology == "parallel" else c), len(beta)
        h, rows = torch.zeros(B, M, dtype=torch.float64), []
        for t in range(L):
            h = alpha * h + beta * source[:, t, :M]
            rows.append(torch.cat([h, source[:, t, M:]], -1))
        r = torch.stack(rows, 1)
        r = c + r if topology == "parallel" else r
        a, b = linear(f"{name}.fusion", r).chunk(2, -1)
        f = r + torch.tanh(b) / (1 + torch.exp(-a))
        x = x + linear(f"{name}.up", FUNCTIONS[feed](linear(f"{name}.down", f)))
        n, fed = norm(f"blocks.{i}.norm2", x), torch.zeros_like(x)
        chance = torch.softmax(linear(f"blocks.{i}.mlp.router", n), -1)
        for b, t in itertools.product(range(B), range(L)):
            best = chance[b, t].argsort(descending=True)[:2]
            for e in best:
                out = FUNCTIONS[feed](n[b, t] @ p[f"blocks.{i}.mlp.up"][e]) @ p[f"blocks.{i}.mlp.down"][e]
                fed[b, t] += chance[b, t, e] / chance[b, t, best].sum() * out
        x = x + fed
    return linear("head", norm("norm", x))


@torch.no_grad()
@pytest.mark.parametrize(
    ("rope_mode", "topology", "activation"), [("gate", "sequential", None), ("rotate", "parallel", "relu"), ("gate", "parallel", "gelu")]
)
def test_the_model_written_out(rope_mode, topology, activation):
    config = {"conv_kernel_size": 4, "conv_dilation_growth": 2.5, "memory_dim_factor": 2}
    config |= {} if activation is None else {"activation": activation}
    model = make(12, 4, rope_mode=rope_mode, topology=topology, **config).double()
    tokens = random_tokens(2, 19)
    want = by_definition(model, tokens, rope_mode, topology, activation or "silu", activation or "gelu")
    torch.testing.assert_close(model(tokens), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.float()(tokens).double(), want, rtol=1e-4, atol=1e-4)


def test_what_it_starts_from():
    model = make(64, 7, seed=None)
    assert [mixer.dilation for mixer in model.mixers] == [1, 2, 4, 1, 2, 4, 1]
    assert [Serriform(8, conv_dilation_growth=2.5, layer=i).dilation for i in range(4)] == [1, 2, 6, 1]
    for mixer in model.mixers:
        lives, alpha = mixer.half_lives, mixer.decay().detach()
        torch.testing.assert_close(lives, 2 ** torch.linspace(0, 10, 16), rtol=1e-3, atol=0)
        torch.testing.assert_close(alpha**lives, torch.full((16,), 0.5))
        torch.testing.assert_close(mixer.beta.detach(), (1 - alpha.double() ** 2).sqrt().float(), rtol=1e-3, atol=0)
    torch.testing.assert_close(model.position.gamma.detach(), torch.full((64,), 0.1))
    torch.testing.assert_close(model.position.phi.detach(), torch.tensor([0.0, -math.pi / 2]).repeat_interleave(32))


def test_the_number_of_a_layer_is_given_once():
    seven = Stack(V, 8, 2, partial(Serriform, layer=2), d_ff=0, position="none")
    mixed = Stack(V, 8, 4, [partial(Attention, n_heads=2), Serriform], d_ff=0, position="none")
    assert [mixer.dilation for mixer in seven.mixers] == [4, 4] and [mixed.mixers[i].dilation for i in (1, 3)] == [2, 1]


# Positions


@torch.no_grad()
@pytest.mark.parametrize("rope_mode", ["gate", "rotate"])
def test_places_far_away_are_exact(rope_mode):
    """At place 10^6 a float32 angle would be wrong by a few percent of a turn."""
    model = make(max_seq_len=None, rope_mode=rope_mode)
    place = torch.tensor([10**6 + 1, 3])
    state = model.init_state(2) | {"position": place}
    exact = model.map_state(lambda t: t.double() if t.is_floating_point() else t, state)
    tokens = random_tokens(2, 5)
    got, want = model(tokens, state), model.double()(tokens, exact)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    turn = (10**6 + 1) * 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    torch.testing.assert_close(angles(place, 4)[0].cos(), turn.cos(), rtol=0, atol=1e-9)
    assert not torch.allclose(got[0], got[1])


def test_lengths_beyond_the_limit_are_refused():
    model = make(max_seq_len=6)
    tokens = random_tokens(1, 7)
    with pytest.raises(ValueError, match="SerriformNet: the sequence needs length 7, but the model was built with max_len=6"):
        model(tokens)
    _, state = model.prefill(tokens[:, :6])
    with pytest.raises(ValueError, match="the state with the new tokens needs length 7"):
        model.step(tokens[:, 0], state)
    with pytest.raises(ValueError, match="the prompt with max_new_tokens needs length 8"):
        model.generate(tokens[:, :5], 4)
    assert make(max_seq_len=None).max_len is None


# As documented


def test_the_documented_calls():
    model = make(16, max_seq_len=1024)
    prompt = torch.tensor([[1, 2, 3, 4]])
    text = model.generate(prompt, max_new_tokens=20, temperature=0.7, top_k=50)  # more than there are tokens
    assert text.shape == (1, 24)
    tokens = [token.item() for token in model.generate(prompt, max_new_tokens=20, temperature=0.7, streaming=True)]
    assert len(tokens) == 20 and all(0 <= token < V for token in tokens)


@torch.no_grad()
def test_past_key_values_are_the_state():
    model, tokens = make(16), random_tokens(2, 9)
    logits, past_key_values = model.prefill(tokens[:, :4])
    for t in range(4, 9):
        logits, past_key_values = model.step(tokens[:, t], past_key_values)
        torch.testing.assert_close(logits, model(tokens)[:, t], rtol=1e-4, atol=1e-5)
    sizes = [{name: tuple(t.shape) for name, t in layer.items()} for layer in past_key_values["layers"]]
    assert sizes == [{"conv": (2, 2, 16), "h": (2, 4)}, {"conv": (2, 4, 16), "h": (2, 4)}]


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, {"topology": "parallel", "rope_mode": "rotate"}, {"use_conv": False}], ids=str)
def test_greedy_streaming_is_greedy_decoding_without_a_cache(config):
    model, tokens = make(16, max_seq_len=None, **config), random_tokens(4, 5)
    streamed = torch.stack(list(model.generate(tokens, 60, streaming=True)), 1)
    for _ in range(60):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(streamed, tokens[:, 5:])


def test_the_documented_constructor_is_the_yaml():
    config = {"use_recurrence": False, "conv_kernel_size": 5}
    kept = dict(config)
    model = SerriformNet(vocab_size=V, dim=16, num_layers=2, arch_config=config)
    words = ("model.d_model=16", "model.n_layers=2", "model.mixer.use_recurrence=false", "model.mixer.conv_kernel_size=5")
    yaml = instantiate(compose_yaml("serriform", f"task.vocab_size={V}", *words).model)
    assert config == kept and repr(model).split("(", 1)[1] == repr(yaml).split("(", 1)[1]
    assert model.max_len == 1024 and model.dropout.p == 0.1
    with torch.device("meta"):
        documented = SerriformNet(vocab_size=50257)
    assert (documented.d_model, len(documented.blocks)) == (512, 12)
    assert receptive_field.by_convolution(documented) == 57  # as far as the public code sees, too
    assert documented.blocks[0].mlp.up.shape == (4, 512, 512)  # four experts have the weights of one MLP of 4 dim
    assert SerriformNet(V, 8, 1, arch_config={"d_ff": 12}).blocks[0].mlp.up.shape == (4, 8, 12)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"use_convolution": False}, "SerriformNet: arch_config use_convolution does not exist; did you mean "),
        ({"memory_dim": 4}, "SerriformNet: arch_config memory_dim does not exist; did you mean memory_dim_factor"),
        ({"layer": 4}, "SerriformNet: arch_config layer does not exist; valid: activation, allow_no_time_mixing, "),
        ({"rope_mode": "rope"}, "SerriformNet: rope_mode='rope'; expected gate or rotate"),
        (
            {"use_conv": False, "use_recurrence": False},
            "Serriform: use_conv and use_recurrence are both off, so nothing is mixed over time; ",
        ),
        ({"topology": "series"}, "Serriform: topology='series'; expected sequential or parallel"),
        ({"activation": "tanh"}, "Serriform: activation='tanh'; expected silu, gelu, relu"),
        ({"use_moe": "no"}, "SerriformNet: arch_config use_moe='no' must be True or False"),
        ({"use_conv": 0}, "SerriformNet: arch_config use_conv=0 must be True or False"),
        ({"conv_dilation_growth": 0.5}, "Serriform: conv_dilation_growth=0.5 must be a number of at least 1"),
        ({"conv_dilation_growth": "2"}, "Serriform: conv_dilation_growth='2' must be a number of at least 1"),
        ({"conv_kernel_size": 0}, "Serriform: conv_kernel_size=0 must be at least 1"),
        ({"conv_dilation_period": 1.5}, "Serriform: conv_dilation_period=1.5 must be an integer"),
        ({"memory_dim_factor": 9}, "Serriform: memory_dim_factor=9 leaves none of the d_model=8 channels"),
        ({"ff_reduction_factor": 9}, "Serriform: ff_reduction_factor=9 leaves none of the d_model=8 channels"),
        (["use_conv"], "SerriformNet: arch_config must be a dict of arguments, got ['use_conv']"),
    ],
    ids=str,
)
def test_mistakes_are_told(config, sentence):
    with pytest.raises(ValueError) as error:
        SerriformNet(V, 8, 1, arch_config=config)
    assert str(error.value).startswith(sentence)
    with pytest.raises(ValueError, match="Rotate turns pairs of channels: d_model=7 must be even"):
        SerriformNet(V, 7, 1, arch_config={"rope_mode": "rotate"})


# Precision and files


@torch.no_grad()
@pytest.mark.parametrize("config", [{"use_moe": False}, {"rope_mode": "rotate", "top_k": 3}], ids=str)
def test_autocast(config):
    """bfloat16 where matrices are multiplied; positions, decays and states are float32, and so is what the blocks add to. All experts or
    none: a choice between two that are about equal may fall otherwise, and then the logits jump."""
    model, tokens = make(64, 4, max_seq_len=None, seed=None, **config), random_tokens(2, 64)
    initialise(model, 0)
    want = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, want=("state",))
        assert model.position(model.embedding(tokens), torch.arange(64)).dtype == torch.float32
    assert (out.y.float() - want).abs().max() < 2e-2 * (want.max() - want.min())
    assert {t.dtype for t in torch.utils._pytree.tree_leaves(out.state)} == {torch.float32, torch.int64}


def test_gradients_are_those_of_the_numbers():
    torch.manual_seed(0)
    layer = Serriform(4, conv_kernel_size=2, memory_dim_factor=2, ff_reduction_factor=2, layer=1).double()
    conformance.randomise(layer, 0)
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    names, values = zip(*layer.named_parameters(), strict=True)
    given = lambda *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), x.detach())  # noqa: E731
    assert torch.autograd.gradcheck(given, values)


@pytest.mark.parametrize("format", ["torchscript", *(pytest.param(f, marks=pytest.mark.slow) for f in ("onnx", "pt2"))])
def test_parallel_and_rotated_exports(format, tmp_path, at_once):  # noqa: F811
    check(export(make(seed=None, topology="parallel", rope_mode="rotate"), format, tmp_path))


# How far it sees


def test_the_receptive_field_of_convolutions():
    """Computed and measured: with random weights the last token that has a gradient is the one that the formula names."""
    model = make(8, 5, max_seq_len=None, use_recurrence=False, conv_kernel_size=3, conv_dilation_growth=3, conv_dilation_period=2)
    tokens = 1 + 2 * (1 + 3 + 1 + 3 + 1)
    assert receptive_field.by_convolution(model) == tokens and receptive_field.half_lives(model) is None
    gradient = receptive_field.measured(model.double(), 64, rows=1)
    assert (gradient[:tokens] > 0).all() and (gradient[tokens:] == 0).all()
    said = f"19 tokens by convolution; measured: {receptive_field.reach(gradient)} of 64 with a gradient above 0.001 of the largest"
    assert receptive_field.summary(model) == said


def test_the_receptive_field_of_recurrences():
    model = make(16, seed=None)
    initialise(model.train(), 0)
    before = torch.get_rng_state()
    both = receptive_field.summary(model)
    assert both.startswith("7 tokens by convolution, half-lives of 1 to 1,024 tokens by recurrence; measured: 24 of 24")
    assert model.training and torch.equal(before, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    alone = make(use_conv=False, use_recurrence=False, allow_no_time_mixing=True)
    assert receptive_field.summary(alone) == "the last token alone; measured: 1 of 24 with a gradient above 0.001 of the largest"
    assert receptive_field.summary(Stack(V, 8, 1, partial(Attention, n_heads=2), max_len=8)) is None
    assert receptive_field.summary(Stack(None, 8, 1, Serriform, d_ff=0, position="none")) is None


def test_a_run_says_how_far_its_model_sees(tiny, capsys, tmp_path):
    words = [word for word in TINY if "n_heads" in word]
    run = tiny("model=serriform", "trainer.max_steps=2", *(f"~{word.split('=')[0]}" for word in words))
    assert "sees:  3 tokens by convolution, half-lives of 1 to 1,024 tokens by recurrence; measured: " in capsys.readouterr().out
    figure = plot_receptive_field(run.path, length=30, output=tmp_path / "field.png")
    lines = figure.axes[0].lines
    assert lines[0].get_xdata()[0] == 1 and lines[0].get_ydata().max() == 1 and list(lines[1].get_xdata()) == [3, 3]
    assert (tmp_path / "field.png").stat().st_size > 1000
