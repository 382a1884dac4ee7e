"""lab.create_model: the models of configs/model by name, their arguments, and what it says to mistakes."""

from __future__ import annotations

import copy

import pytest
import torch
from hydra.utils import instantiate
from test_models import compose_yaml

import lab
from lab.models import create_model, initialise
from lab.models.create import ARCHITECTURES, LATER

DECODER = {"transformer": {"kind": "decoder"}}


def create(name: str, **options):
    return create_model(name, d_model=32, d_state=8, num_layers=2, architecture_kwargs=DECODER.get(name), **options)


def shapes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_is_the_model_of_the_yaml(name):
    """The same modules with the same options: nothing that a YAML says is missing here."""
    d_state = ["model.mixer.d_state=8"] if name in ("mamba", "s4d", "s5") else []
    sizes = ["model.d_model=32", "model.n_layers=2", "model.dropout=0.1"]
    yaml = instantiate(compose_yaml(name, "+task={vocab_size: 11, seq_len: 32}", *sizes, *d_state).model)
    model = create(name, vocab_size=11, max_seq_len=32)
    assert repr(model) == repr(yaml) and shapes(model) == shapes(yaml)
    initialise(model, 0), initialise(yaml, 0)
    tokens = torch.randint(0, 11, (2, 9))
    assert torch.equal(model.eval()(tokens), yaml.eval()(tokens))


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_a_vocabulary_it_maps_floats(name):
    model, x = create(name).eval(), torch.randn(2, 9, 32)
    want = model(x)
    assert want.shape == x.shape and not {"embedding.weight", "head.weight"} & set(shapes(model))
    logits, state = model.prefill(x[:, :4])
    torch.testing.assert_close(logits, want[:, :4], rtol=1e-4, atol=1e-5)
    for t in range(4, 9):
        one, state = model.step(x[:, t] if t % 2 else x[:, t : t + 1], state)
        torch.testing.assert_close(one, want[:, t], rtol=1e-4, atol=1e-5)
    assert model.step(x[:, 0], model.init_state(2))[0].shape == (2, 32)
    torch.testing.assert_close(model(x, lengths=torch.tensor([9, 3]))[1, :3], want[1, :3], rtol=1e-4, atol=1e-5)
    for tokens in (torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9)):
        with pytest.raises(ValueError, match=r"Stack without vocab_size takes floats \(B, L, d_model\), got torch"):
            model(tokens)


def test_names_and_defaults():
    assert lab.create_model is create_model
    model = create_model("mamba", vocab_size=11)
    assert (len(model.blocks), model.blocks[0].mixer.d_state, model.dropout.p, model.embedding.weight.shape) == (4, 64, 0.1, (11, 256))
    assert model.blocks[0].mixer.n_layers == 4 and model.max_len is None
    assert create_model("lot", None, 64, 16, 2, 100, 0.0, 11).max_len == 100
    assert repr(create_model("s4d", "s4d", d_model=16)) == repr(create_model("s4d", d_model=16))


def test_kwargs_win_and_are_left_alone():
    of_layer, of_stack = {"d_state": 4, "expand_factor": 1}, {"num_layers": 3, "dropout": 0.0, "d_ff": 8}
    before = copy.deepcopy((of_layer, of_stack))
    model = create_model("mamba", d_model=16, num_layers=2, layer_kwargs=of_layer, architecture_kwargs=of_stack)
    assert (of_layer, of_stack) == before
    mixer = model.blocks[0].mixer
    assert (len(model.blocks), mixer.n_layers, mixer.d_state, mixer.d_inner) == (3, 3, 4, 16)
    assert model.dropout.p == 0.0 and model.blocks[0].mlp.up.out_features == 8
    assert create_model("lot", d_model=16, layer_kwargs={"num_heads": 2}).blocks[0].mixer.n_heads == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("mambo",), "architecture mambo does not exist; did you mean mamba? valid: lot, mamba, s4d, s5, transformer"),
        (("rnn",), "architecture rnn does not exist; valid: lot, mamba, s4d, s5, transformer"),
        ((None,), "architecture None does not exist; valid: lot, mamba, s4d, s5, transformer"),
        ((["mamba"],), "architecture ['mamba'] does not exist; did you mean mamba? valid: lot, mamba, s4d, s5, transformer"),
        (("mamba", "s6"), "ssm_layer s6 does not exist; valid: mamba, s4, s4d, s5"),
        (("h3", "s4d"), "architecture h3 is not there yet; there are lot, mamba, s4d, s5, transformer"),
        (("mamba", "s4"), "mamba has no place for an ssm_layer, got s4; leave it out"),
        (("mamba", [3]), "architecture_kwargs must be a dict of arguments, got [3]"),
        (("mamba", None, [3]), "layer_kwargs must be a dict of arguments, got [3]"),
        (("mamba", None, {3: 3}), "layer_kwargs 3 does not exist; valid: d_conv, d_state, dt_max, "),
        (("mamba", "s4d"), "mamba has no place for an ssm_layer, got s4d; leave it out"),
        (("transformer",), 'a transformer of kind encoder_decoder is not there yet; architecture_kwargs={"kind": "decoder"} is'),
        (("transformer", {"kind": "decode"}), "kind decode does not exist; did you mean decoder? valid: decoder, encoder, encoder_decoder"),
        (("mamba", {"d_fff": 2}), "architecture_kwargs d_fff does not exist; did you mean d_ff? valid: d_ff, d_model, dropout, max_len, "),
        (("mamba", {"kind": "decoder"}), "architecture_kwargs kind does not exist; valid: "),
        (("mamba", {"num_layers": 1, "n_layers": 1}), "architecture_kwargs has n_layers twice, under two names"),
        (
            ("mamba", None, {"expand": 2}),
            "layer_kwargs expand does not exist; did you mean expand_factor? valid: d_conv, d_state, dt_max, ",
        ),
    ],
)
def test_mistakes_are_told(arguments, sentence):
    name, *rest = arguments
    ssm_layer = rest.pop(0) if rest and isinstance(rest[0], str) else None
    of_stack, of_layer = [*rest, None, None][:2]
    with pytest.raises(ValueError) as error:
        create_model(name, ssm_layer, architecture_kwargs=of_stack, layer_kwargs=of_layer)
    assert str(error.value).startswith(f"create_model: {sentence}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"d_model": "abc"}, "d_model='abc' must be an integer"),
        ({"d_model": -1}, "d_model=-1 must be at least 1"),
        ({"d_model": 16.0}, "d_model=16.0 must be an integer"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"dropout": "0.1"}, "dropout='0.1' must be a number from 0 to 1"),
        ({"dropout": 1.5}, "dropout=1.5 must be a number from 0 to 1"),
    ],
)
def test_sizes_that_cannot_be_are_told(arguments, sentence):
    with pytest.raises(ValueError) as error:
        create_model("mamba", **arguments)
    assert str(error.value) == f"create_model: {sentence}"


def test_every_documented_architecture_is_there_or_said_to_come():
    documented = "h3 gated_mlp mamba s4 s4d s5 transformer laminarnet serriformnet lot".split()
    assert sorted((*ARCHITECTURES, *LATER)) == sorted(documented)


def test_tying_needs_a_vocabulary():
    with pytest.raises(ValueError, match="tied=True shares the weights of an embedding, and without vocab_size there is none"):
        create_model("mamba", architecture_kwargs={"tied": True})
