"""lab.create_model: the models of configs/model by name, their arguments, and what it says to mistakes."""

from __future__ import annotations

import copy

import pytest
import torch
from hydra.utils import instantiate
from test_models import OPTION, compose_yaml

import lab
from lab.models import SerriformNet, create_model, initialise
from lab.models.create import ARCHITECTURES, LAYERS, OWN_CLASSES

DECODER = {"transformer": {"kind": "decoder"}}
NAMES = ", ".join(sorted((*ARCHITECTURES, *OWN_CLASSES)))
SLOTS = ("h3", "gated_mlp", "mamba")


def create(name: str, ssm_layer: str | None = None, **options):
    return create_model(name, ssm_layer, d_model=32, d_state=8, num_layers=2, architecture_kwargs=DECODER.get(name), **options)


@pytest.mark.parametrize(
    ("name", "ssm_layer"),
    [*((name, None) for name in (*ARCHITECTURES, "serriformnet")), ("h3", "s5"), ("gated_mlp", "s4d"), ("mamba", "s4d"), ("h3", "mamba")],
)
def test_it_is_the_model_of_the_yaml(name, ssm_layer):
    """The same modules with the same options: nothing that a YAML says is missing here."""
    words = ["task.vocab_size=11", "task.seq_len=32", "model.d_model=32", "model.n_layers=2", "model.dropout=0.1"]
    words += ["model.mixer.d_state=8"] if name not in ("gated_mlp", "lot", "serriformnet", "transformer") else []
    words += [f"ssm_layer={ssm_layer or 'none'}"] if name in SLOTS else []
    words += ["model.mixer.ssm_layer.d_state=8"] if ssm_layer else []
    yaml = instantiate(compose_yaml(OPTION.get(name, name), *words).model)
    model = create(name, ssm_layer, vocab_size=11, max_seq_len=32)
    assert repr(model).split("(", 1)[1] == repr(yaml).split("(", 1)[1] and shapes(model) == shapes(yaml)
    initialise(model, 0), initialise(yaml, 0)
    tokens = torch.randint(0, 11, (2, 9))
    assert torch.equal(model.eval()(tokens), yaml.eval()(tokens))


@pytest.mark.parametrize("ssm_layer", [None, *LAYERS])
@pytest.mark.parametrize("name", SLOTS)
def test_every_combination(name, ssm_layer):
    """Built, run, and every parameter has a gradient."""
    model = create_model(name, ssm_layer, d_model=16, d_state=4, num_layers=2)
    y = model(torch.randn(2, 9, 16))
    assert y.shape == (2, 9, 16) and model.causal
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    inside = model.mixers[0].ssm
    if ssm_layer in (None, name):
        assert repr(model) == repr(create_model(name, d_model=16, d_state=4, num_layers=2))
    else:
        assert type(inside) is LAYERS[ssm_layer] and not getattr(inside, "mixing", False)


def test_the_documented_calls():
    h3 = create_model("h3", "s4d", d_model=256)
    assert (len(h3.mixers), h3.mixers[0].shift.shape, h3.mixers[0].ssm.A_im.shape) == (4, (64, 256), (256, 32))
    gated = create_model(
        architecture="gated_mlp", ssm_layer="s4d", d_model=32, d_state=16, num_layers=3, max_seq_len=100, dropout=0.2, vocab_size=11,
        layer_kwargs={"bidirectional": True, "init_method": "lin"}, architecture_kwargs={"expand_factor": 2, "activation": "gelu"},
    )  # fmt: skip
    mixer = gated.mixers[0]
    assert (mixer.ssm.D.shape, mixer.ssm.A_im.shape[1], mixer.ssm.init_method, mixer.activation) == ((64,), 8, "lin", "gelu")
    assert not gated.causal and gated.dropout.p == 0.2 and gated(torch.zeros(2, 100, dtype=torch.long)).shape == (2, 100, 11)
    with pytest.raises(NotImplementedError, match="GatedMLP reads the whole sequence, the future too, so it has no state and no step"):
        gated.init_state(1)


def shapes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize("name", [*ARCHITECTURES, "serriformnet"])
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
    for tokens in (torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9), torch.zeros(2, 9, 33)):
        with pytest.raises(ValueError, match=r"^(Stack|SerriformNet) without vocab_size takes floats \(B, L, 32\), got torch"):
            model(tokens)


def test_serriformnet_has_its_documented_switches():
    switches = {"use_moe": False, "rope_mode": "rotate", "use_recurrence": False}
    model = create_model("serriformnet", d_model=16, num_layers=2, vocab_size=11, layer_kwargs=switches)
    same = create_model("serriformnet", d_model=16, num_layers=3, vocab_size=11, architecture_kwargs={**switches, "num_layers": 2})
    assert type(model) is SerriformNet and repr(model) == repr(same) == repr(SerriformNet(11, 16, 2, 2048, 0.1, switches))
    experts = {"n_experts": 3, "top_k": 1, "capacity_factor": 1.5, "router_noise": 0.1}
    kinds = {"layer_kwargs": {**experts, "dropout": 0.2}, "architecture_kwargs": {"dropout": 0.3, "max_len": 7, "activation": "relu"}}
    model = create_model("serriformnet", d_model=16, **kinds)
    block = model.blocks[0]
    assert {name: getattr(block.mlp, name) for name in experts} == experts and block.mlp.activation == "relu"
    assert (block.mixer.dropout.p, block.dropout.p, model.max_len) == (0.2, 0.3, 7)


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
    for where in ("layer_kwargs", "architecture_kwargs"):  # a layer without another in its slot takes its own from both
        assert create_model("h3", d_model=16, **{where: {"d_head": 2}}).mixers[0].d_head == 2
    of_stack |= {"expand_factor": 1}
    model = create_model("mamba", "s4d", d_model=16, layer_kwargs={"d_state": 6, "mixing": True}, architecture_kwargs=of_stack)
    mixer = model.mixers[0]
    assert (mixer.d_inner, mixer.n_layers, mixer.ssm.A_im.shape[1], mixer.ssm.mixing) == (16, 3, 3, True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("mambo",), f"architecture mambo does not exist; did you mean mamba? valid: {NAMES}"),
        (("rnn",), f"architecture rnn does not exist; valid: {NAMES}"),
        ((None,), f"architecture None does not exist; valid: {NAMES}"),
        ((["mamba"],), f"architecture ['mamba'] does not exist; did you mean mamba? valid: {NAMES}"),
        (("mamba", "s6"), f"ssm_layer s6 does not exist; valid: {', '.join(LAYERS)}"),
        (("h3", "s4dd"), f"ssm_layer s4dd does not exist; did you mean s4d? valid: {', '.join(LAYERS)}"),
        (("s5", "s4d"), "s5 has no place for an ssm_layer, got s4d; leave it out"),
        (("h3", "s4d", {"init_method": "lin"}), "architecture_kwargs init_method does not exist; it belongs in layer_kwargs"),
        (("h3", "s4d", None, {"d_head": 2}), "layer_kwargs d_head does not exist; it belongs in architecture_kwargs"),
        (("h3", "s4d", {"d_hed": 2}), "architecture_kwargs d_hed does not exist; did you mean d_head? valid: d_ff, d_head, d_model, "),
        (("mamba", "s4d", {"dt_rank": 2}), "architecture_kwargs dt_rank does not exist; valid: d_conv, d_ff, d_model, dropout, "),
        (("gated_mlp", None, {"bidirectional": True}), "layer_kwargs bidirectional does not exist; valid: activation, expand_factor"),
        (("h3", {"d_head": 2}, {"d_head": 2}), "d_head is given twice, in layer_kwargs and in architecture_kwargs"),
        (("serriformnet", "s4d"), "serriformnet has no place for an ssm_layer, got s4d; leave it out"),
        (("serriformnet", {"use_mo": False}), "architecture_kwargs use_mo does not exist; did you mean use_moe? valid: activation, "),
        (("serriformnet", {"top_k": 2}, {"top_k": 1}), "top_k is given twice, in layer_kwargs and in architecture_kwargs"),
        (("serriformnet", None, {"dim": 2}), "layer_kwargs dim does not exist; it belongs in architecture_kwargs"),
        (("mamba", [3]), "architecture_kwargs must be a dict of arguments, got [3]"),
        (("mamba", None, [3]), "layer_kwargs must be a dict of arguments, got [3]"),
        (("mamba", None, {3: 3}), "layer_kwargs 3 does not exist; valid: d_conv, d_state, dt_max, "),
        (("transformer", {"d_f": 2}), "architecture_kwargs d_f does not exist; did you mean d_ff? valid: attention_dropout, d_ff, "),
        (("transformer", {"dropout": 0.1}, {"droput": 0.1}), "layer_kwargs droput does not exist; did you mean dropout? valid: dropout, "),
        (("transformer", {"n_heads": 2}, {"num_heads": 2}), "n_heads is given twice, in layer_kwargs and in architecture_kwargs"),
        (("transformer", {"kind": "decoder"}, {"bidirectional": True}), "layer_kwargs bidirectional does not exist; valid: dropout, "),
        (("transformer", {"kind": "decode"}), "kind decode does not exist; did you mean decoder? valid: decoder, encoder, encoder_decoder"),
        (("mamba", {"d_fff": 2}), "architecture_kwargs d_fff does not exist; did you mean d_ff? valid: d_conv, d_ff, d_model, dropout, "),
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


def test_every_documented_architecture_is_there():
    documented = "h3 gated_mlp mamba s4 s4d s5 transformer laminarnet serriformnet lot".split()
    assert sorted((*ARCHITECTURES, *OWN_CLASSES)) == sorted(documented)


def test_tying_needs_a_vocabulary():
    with pytest.raises(ValueError, match="tied=True shares the weights of an embedding, and without vocab_size there is none"):
        create_model("mamba", architecture_kwargs={"tied": True})
