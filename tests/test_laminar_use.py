"""LaminarNet: its parts, its arguments and their mistakes, and its documented use word for word."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from test_laminar import random, small
from test_models import V, compose_yaml, random_tokens
from torch import nn

from lab.analysis import conformance
from lab.mixers import GeometricDriftField
from lab.models import Laminar, LaminarNet, LaminarNetConfig, Stack, create_model

# Parts and arguments


def test_where_the_drift_starts():
    torch.manual_seed(0)
    field = GeometricDriftField(64, n_heads=4)
    dt = nn.functional.softplus(field.bias).detach().view(8, 4)  # channel c belongs to head c mod 4
    edges = torch.logspace(-3, -1, 9)
    assert ((edges[:-1, None] * 0.999 <= dt) & (dt <= edges[1:, None] * 1.001)).all(), "each head spans the range"
    assert torch.equal(field.head_mixing, torch.eye(4))
    assert (field.m, field.in_proj.weight.shape, field.out_proj.bias) == (32, (192, 64), None)
    assert field(torch.randn(2, 5, 64)).shape == (2, 5, 64)


def test_a_drift_field_is_a_mixer_of_any_stack():
    make = lambda: Stack(V, 8, 1, partial(GeometricDriftField, n_heads=2), d_ff=0, position="none")  # noqa: E731
    model = random(make())
    for check in conformance.CHECKS:
        check(model, random_tokens())
    conformance.check_borders(model, random_tokens(3, 70), (15, 16, 64, 67))


def test_parameters_that_nobody_would_read_are_missing():
    names = {name for name, _ in small((1, 4, 16)).named_parameters()}
    assert "blocks.0.feed_forwards.2.up.weight" in names and "blocks.1.feed_forwards.0.up.weight" in names
    assert not [name for name in names if name.startswith(("blocks.1.feed_forwards.1", "blocks.1.norms_ff.1", "mesh.phi"))]
    model = small()
    assert model.head.weight is model.embedding.weight and "mesh.K" in names and small(position="none").mesh is None


def test_a_config_and_a_yaml_make_the_same_model():
    config = LaminarNetConfig(vocab_size=V, d_model=32, n_layers=2, seq_len=32)
    yaml = instantiate(compose_yaml("laminar", f"task.vocab_size={V}", "task.seq_len=32", "model.d_model=32", "model.n_layers=2").model)
    model = LaminarNet(config)
    made = create_model("laminarnet", d_model=32, num_layers=2, max_seq_len=32, vocab_size=V)
    for other in (yaml, made, copy.deepcopy(model)):
        assert isinstance(other, Laminar) and repr(other).partition("(")[2] == repr(model).partition("(")[2]
        assert all(getattr(other, name) == value for name, value in vars(config).items() if name != "strata_ratios")
    assert model != LaminarNet(config) and len({model, yaml}) == 2, "modules are equal to themselves alone"
    assert yaml.ratios == (1, 4) and LaminarNet(LaminarNetConfig(d_model=16, n_strata=4, vocab_size=V)).ratios == (1, 4, 16, 64)


def test_without_a_vocabulary_it_maps_floats():
    model, x = random(create_model("laminarnet", d_model=16, num_layers=1, layer_kwargs={"num_heads": 2})), torch.randn(2, 9, 16)
    with torch.no_grad():
        want = model(x)
        y, state = model.prefill(x[:, :5])
        torch.testing.assert_close(torch.cat([y, model.step(x[:, 5], state)[0][:, None]], 1), want[:, :6], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"Laminar without vocab_size takes floats \(B, L, 16\), got torch.int64"):
        model(random_tokens())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"strata_ratios": (1, 2, 3), "n_strata": 3}, "strata_ratios=[1, 2, 3]: 3 is no multiple of 2, the ratio before it"),
        ({"strata_ratios": (2, 4)}, "strata_ratios=[2, 4] must begin with 1: the finest stratum has every token"),
        ({"strata_ratios": (1, 4, 16)}, "strata_ratios=[1, 4, 16] must have one ratio for each of n_strata=2 strata"),
        ({"strata_ratios": (1, 0)}, "LaminarNet: strata_ratios[1]=0 must be at least 1"),
        ({"n_strata": 0}, "LaminarNet: n_strata=0 must be at least 1"),
        ({"d_model": 20}, "GeometricDriftField: d_model=20 must be a multiple of 2 n_heads = 16"),
        ({"theta_max": 4.0}, "GeometricDriftField: theta_max=4.0 must be above 0 and at most pi"),
        ({"dt_min": 1.0}, "GeometricDriftField: dt_min=1.0 and dt_max=0.1 must be above 0"),
        ({"position": "sin"}, "LaminarNet: position='sin'; expected pme, rope or none"),
        ({"vocab_size": 0}, "LaminarNet: vocab_size=0 must be at least 1"),
    ],
)
def test_arguments_that_cannot_be(options, told):
    with pytest.raises(ValueError) as error:
        LaminarNet(LaminarNetConfig(**{"vocab_size": V, "d_model": 16, "n_layers": 1, **options}))
    assert told in str(error.value)


def test_mistakes_in_a_call_are_told():
    model = small()
    for call, told in (
        (lambda: model(random_tokens(), source=random_tokens()), "LaminarNet is a decoder without cross-attention: it takes no source"),
        (lambda: model(random_tokens() + V), rf"LaminarNet: token \d+ is not in the vocabulary, 0..{V - 1}"),
        (lambda: model(random_tokens(), lengths=torch.tensor([1, 2])), "LaminarNet: lengths has shape"),
        (lambda: create_model("laminarnet", "s4d"), "create_model: laminarnet has no place for an ssm_layer, got s4d"),
        (lambda: create_model("laminarnet", layer_kwargs={"theta_mx": 1}), "layer_kwargs theta_mx does not exist; did you mean theta_max"),
    ):
        with pytest.raises(ValueError, match=told):
            call()


def test_the_record():
    out = small((1, 4))(random_tokens(), want=("record",))
    assert {name: [tuple(t.shape) for t in of] for name, of in out.record.items()} == {
        "retention.0": [(3, 9, 8)] * 2, "size.0": [(3, 9, 8)] * 2, "retention.1": [(3, 2, 8)] * 2, "size.1": [(3, 2, 8)] * 2,
        "phases": [(9, 3)],
    }  # fmt: skip


def test_generation():
    model, prompt = random(small((1, 4))), random_tokens(2, 5)
    tokens = model.generate(prompt, 9)
    for t in range(5, 14):
        assert torch.equal(model(tokens[:, :t])[:, -1].argmax(-1), tokens[:, t])
    ragged = model.generate(prompt, 6, lengths=torch.tensor([5, 3]))
    assert torch.equal(ragged[1, 3:9], model.generate(prompt[1:, :3], 6)[0, 3:])


# The documented use, word for word but for the import


def test_the_documented_use(capsys):
    config = LaminarNetConfig(
        vocab_size=32000,
        d_model=256,
        n_layers=6,
        seq_len=2048,
        n_strata=2
    )  # fmt: skip
    model = LaminarNet(config)
    inputs = torch.randint(0, 32000, (1, 128))  # (Batch, SeqLen)
    logits = model(inputs)
    assert logits.shape == torch.Size([1, 128, 32000])

    model.eval()
    state = model.init_state(batch_size=1, device="cpu")
    token = torch.tensor([1])  # BOS token
    generated = [token.item()]
    for _ in range(5):
        logits, state = model.step(token, state)  # (B, vocab_size)
        token = logits.argmax(dim=-1)  # greedy sampling
        generated.append(token.item())
    assert logits.shape == (1, 32000)
    with torch.no_grad():
        assert model(torch.tensor([generated[:-1]]))[0].argmax(-1).tolist() == generated[1:]

    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs = torch.randint(0, 32000, (1, 16))
    targets = torch.randint(0, 32000, (1, 16))
    model.train()
    optimizer.zero_grad()
    logits = model(inputs)  # (B, N, Vocab)
    loss = criterion(logits.view(-1, config.vocab_size), targets.view(-1))
    loss.backward()
    optimizer.step()
    assert math.isfinite(loss.item())

    config = LaminarNetConfig(
        d_model=512,
        n_heads=8,
        n_layers=12,
        d_ff=2048,
        n_strata=3,            # 3 levels of hierarchy
        strata_ratios=(1, 4, 16), # Compression ratios for each stratum
        n_oscillators=32,      # Number of phase oscillators
        dropout=0.1
    )  # fmt: skip
    with torch.device("meta"):
        model = LaminarNet(config)
    assert len(model.blocks) == 12 and model.mesh.omega.shape == (32,) and model.config is config
