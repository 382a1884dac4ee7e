"""`create_model("h3", "s4", d_model=256, num_layers=4)`: a model by name, in plain Python, without a config.

With `vocab_size` it maps tokens (B, L) to logits (B, L, V), without floats (B, L, D) to floats (B, L, D). The models are those of
configs/model/ by the same names (serriformnet: serriform), and what stands in a slot that of configs/ssm_layer/.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

from lab.config.errors import nearest
from lab.mixers import (
    Attention,
    GatedMLP,
    GeometricDriftField,
    H3Layer,
    Lattice,
    MambaLayer,
    Mixer,
    S4DLayer,
    S4Layer,
    S5Layer,
)  # fmt: skip
from lab.mixers.base import check_at_least
from lab.models.base import SequenceModel
from lab.models.laminar import Laminar
from lab.models.serriform import KEYS, SerriformNet
from lab.models.stack import Stack
from lab.models.transformer import TransformerModel


class Architecture(NamedTuple):
    layer: Callable[..., Mixer]
    stack: dict[str, Any] = {}  # what the stack around the layer has that is not Stack's default
    own: tuple[str, ...] = ()  # of a layer with a slot: its arguments that do not depend on what stands there


STATE_SPACE: dict[str, Any] = {"d_ff": 0, "position": "none"}
ARCHITECTURES = {
    "gated_mlp": Architecture(GatedMLP, STATE_SPACE, ("activation", "expand_factor")),
    "h3": Architecture(H3Layer, {"position": "none"}, ("d_head", "d_state")),
    "lot": Architecture(partial(Lattice, n_heads=8)),
    "mamba": Architecture(MambaLayer, {**STATE_SPACE, "norm": "rms", "tied": True}, ("d_conv", "expand_factor")),
    "s4": Architecture(S4Layer, STATE_SPACE),
    "s4d": Architecture(S4DLayer, STATE_SPACE),
    "s5": Architecture(S5Layer, STATE_SPACE),
    "transformer": Architecture(partial(Attention, n_heads=8)),
}
LAYERS: dict[str, Callable[..., Mixer]] = {"mamba": MambaLayer, "s4": S4Layer, "s4d": S4DLayer, "s5": S5Layer}
"""What a slot takes."""

KINDS = ("encoder_decoder", "decoder", "encoder")  # of transformer
OF_BOTH_SIDES = {"n_heads": "n_heads", "dropout": "attention_dropout", "window": "window", "mask_convention": "mask_convention"}
"""Arguments of Attention that both sides of an encoder-decoder have, and their names in TransformerModel."""
OURS = {"num_heads": "n_heads", "num_layers": "n_layers", "max_seq_len": "max_len"}  # documented name -> the name of the argument
OF_LAMINAR = {**OURS, "max_seq_len": "seq_len"}
OF_SERRIFORM = {"d_model": "dim", "n_layers": "num_layers", "max_len": "max_seq_len"}  # whose own names are the documented ones
OWN_CLASSES = ("laminarnet", "serriformnet")  # not a Stack of a layer by its name


def create_model(
    architecture: str,
    ssm_layer: str | None = None,
    d_model: int = 256,
    d_state: int = 64,
    num_layers: int = 4,
    max_seq_len: int = 2048,
    dropout: float = 0.1,
    vocab_size: int | None = None,
    layer_kwargs: Mapping[str, Any] | None = None,
    architecture_kwargs: Mapping[str, Any] | None = None,
) -> SequenceModel:
    """architecture: gated_mlp, h3, laminarnet, lot, mamba, s4, s4d, s5, serriformnet, transformer. That is an encoder-decoder, called as
    model(src, tgt), or one side of it, with architecture_kwargs={"kind": "decoder"} or "encoder". ssm_layer: mamba, s4, s4d or s5 in the
    slot of gated_mlp, h3 and mamba. Without one gated_mlp mixes nothing over time, h3 has the diagonal state space of its paper and mamba
    the selective scan, which it also has with mamba.

    layer_kwargs: arguments of the ssm_layer, without one of the architecture's layer. architecture_kwargs: of the stack, and those of the
    layer around a slot. Of serriformnet: the keys of arch_config, in either, and in architecture_kwargs those of SerriformNet. Both win
    over the other arguments and are left as they are. d_state counts for state spaces, max_seq_len where there are positions. ValueError
    for what does not exist. `initialise(model, seed)` makes the weights those of a seed.
    """
    _expect("architecture", architecture, (*ARCHITECTURES, *OWN_CLASSES))
    _check_general(d_model, num_layers, dropout)
    if architecture in OWN_CLASSES:
        if ssm_layer is not None:
            raise ValueError(f"create_model: {architecture} has no place for an ssm_layer, got {ssm_layer}; leave it out")
        make = _laminarnet if architecture == "laminarnet" else _serriformnet
        documented = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "num_layers": num_layers,
            "max_seq_len": max_seq_len,
            "dropout": dropout,
        }
        return make(layer_kwargs, architecture_kwargs, documented)
    layer, defaults, own = ARCHITECTURES[architecture]
    if ssm_layer is not None:
        _expect("ssm_layer", ssm_layer, LAYERS)
        if not own and ssm_layer != architecture:
            raise ValueError(f"create_model: {architecture} has no place for an ssm_layer, got {ssm_layer}; leave it out")
    inside = None if ssm_layer in (None, architecture) else LAYERS[ssm_layer]

    general = {"vocab_size": vocab_size, "d_model": d_model, "n_layers": num_layers, "max_len": max_seq_len, "dropout": dropout}
    kinds = {"kind"} if architecture == "transformer" else set()
    if kinds and (architecture_kwargs is None or isinstance(architecture_kwargs, Mapping)):
        kind = (architecture_kwargs or {}).get("kind", KINDS[0])
        if kind == KINDS[0]:
            return _encoder_decoder(layer_kwargs, architecture_kwargs, general)
    valid = {
        "layer_kwargs": _arguments(inside or layer) - {"d_model", "layer", "ssm_layer"} - ({"bidirectional"} if kinds else set()),
        "architecture_kwargs": _arguments(Stack) - {"mixer", "pattern", "encoder", "cross"} | kinds | set(own),
    }
    of_layer = _checked("layer_kwargs", layer_kwargs, valid)
    of_stack = _checked("architecture_kwargs", architecture_kwargs, valid)
    of_block = {name: of_stack.pop(name) for name in own if name in of_stack}
    if kinds:
        kind = of_stack.pop("kind")
        _expect("kind", kind, KINDS)
        layer = partial(layer, bidirectional=True) if kind == "encoder" else layer

    arguments = {**general, **defaults, **of_stack}
    if arguments["vocab_size"] is None:
        arguments["tied"] = of_stack.get("tied", False)
    offered = {"d_state": d_state, "n_layers": arguments["n_layers"]}
    if inside is not None:
        of_block["ssm_layer"] = _partial(inside, offered, of_layer)
    else:
        _refuse_twice(of_layer, of_block)
        of_block |= of_layer
    return Stack(mixer=_partial(layer, offered, of_block), **arguments)


def _check_general(d_model: Any, num_layers: Any, dropout: Any) -> None:
    check_at_least("create_model", 1, d_model=d_model, num_layers=num_layers)
    if not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise ValueError(f"create_model: dropout={dropout!r} must be a number from 0 to 1")


def _encoder_decoder(
    layer_kwargs: Mapping[str, Any] | None, architecture_kwargs: Mapping[str, Any] | None, general: Mapping[str, Any]
) -> TransformerModel:
    """Its layers are attention on both sides. dropout is that of the attention weights in layer_kwargs, and the model's in
    architecture_kwargs."""
    valid = {"layer_kwargs": set(OF_BOTH_SIDES), "architecture_kwargs": _arguments(TransformerModel) | {"kind"}}
    of_layer = _checked("layer_kwargs", layer_kwargs, valid)
    of_model = _checked("architecture_kwargs", architecture_kwargs, valid)
    of_model.pop("kind", None)
    of_layer = {OF_BOTH_SIDES[name]: value for name, value in of_layer.items()}
    _refuse_twice(of_layer, of_model)
    return TransformerModel(**{**general, **of_layer, **of_model})


def _laminarnet(
    layer_kwargs: Mapping[str, Any] | None, architecture_kwargs: Mapping[str, Any] | None, general: Mapping[str, Any]
) -> Laminar:
    """Its layer is the drift field, whose arguments are among those of the model."""
    valid = {"layer_kwargs": _arguments(GeometricDriftField) - {"d_model"}, "architecture_kwargs": _arguments(Laminar)}
    of_layer = _checked("layer_kwargs", layer_kwargs, valid, OF_LAMINAR)
    of_model = _checked("architecture_kwargs", architecture_kwargs, valid, OF_LAMINAR)
    _refuse_twice(of_layer, of_model)
    return Laminar(**{**{OF_LAMINAR.get(name, name): value for name, value in general.items()}, **of_layer, **of_model})


def _serriformnet(
    layer_kwargs: Mapping[str, Any] | None, architecture_kwargs: Mapping[str, Any] | None, general: Mapping[str, Any]
) -> SerriformNet:
    """dropout is the mixer's in layer_kwargs, and the model's in architecture_kwargs."""
    general = {OF_SERRIFORM.get(name, name): value for name, value in general.items()}
    valid = {"layer_kwargs": KEYS, "architecture_kwargs": KEYS | general.keys()}
    of_layer = _checked("layer_kwargs", layer_kwargs, valid, OF_SERRIFORM)
    given = _checked("architecture_kwargs", architecture_kwargs, valid, OF_SERRIFORM)
    of_model = {name: given.pop(name) for name in general if name in given}
    _refuse_twice(of_layer, given)
    return SerriformNet(**{**general, **of_model}, arch_config={**of_layer, **given})


def _refuse_twice(of_layer: Mapping[str, Any], of_stack: Mapping[str, Any]) -> None:
    if twice := of_layer.keys() & of_stack.keys():
        raise ValueError(f"create_model: {min(twice)} is given twice, in layer_kwargs and in architecture_kwargs")


def _partial(layer: Callable[..., Mixer], offered: Mapping[str, Any], given: Mapping[str, Any]) -> Callable[..., Mixer]:
    """The layer with what it takes of the arguments that are offered, and with those that are given."""
    taken = {name: value for name, value in offered.items() if name in _arguments(layer)}
    return partial(layer, **{**taken, **given})


def _arguments(callable_: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(callable_).parameters)


def _checked(
    what: str, given: Mapping[str, Any] | None, valid: Mapping[str, Collection[str]], ours_of: Mapping[str, str] = OURS
) -> dict[str, Any]:
    """A copy, with the names of the arguments for the documented ones. valid: the names for `what`, and for the other dictionary."""
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"create_model: {what} must be a dict of arguments, got {given!r}")
    ours: dict[str, Any] = {}
    for documented, value in (given or {}).items():
        name = ours_of.get(documented, documented)
        for other, names in valid.items():
            if name not in valid[what] and name in names:
                raise ValueError(f"create_model: {what} {name} does not exist; it belongs in {other}")
        _expect(what, name, valid[what])
        if name in ours:
            raise ValueError(f"create_model: {what} has {name} twice, under two names")
        ours[name] = value
    return ours


def _expect(what: str, name: Any, valid: Collection[str]) -> None:
    if not isinstance(name, str) or name not in valid:
        near = nearest(str(name), valid)
        meant = f"; did you mean {near}?" if near else ";"
        raise ValueError(f"create_model: {what} {name} does not exist{meant} valid: {', '.join(sorted(valid))}")
