"""`create_model("mamba", d_model=256, num_layers=4)`: a model by name, in plain Python, without a config.

With `vocab_size` it maps tokens (B, L) to logits (B, L, V), without floats (B, L, D) to floats (B, L, D). The models are those of
configs/model/ by the same names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from lab.config.errors import nearest
from lab.mixers import Attention, Lattice, MambaLayer, Mixer, S4DLayer, S5Layer
from lab.mixers.base import check_at_least
from lab.models.base import SequenceModel
from lab.models.stack import Stack

STATE_SPACE: dict[str, Any] = {"d_ff": 0, "position": "none"}
ARCHITECTURES: dict[str, tuple[Callable[..., Mixer], dict[str, Any]]] = {
    "lot": (partial(Lattice, n_heads=8), {}),
    "mamba": (MambaLayer, {**STATE_SPACE, "norm": "rms", "tied": True}),
    "s4d": (S4DLayer, STATE_SPACE),
    "s5": (S5Layer, STATE_SPACE),
    "transformer": (partial(Attention, n_heads=8), {}),
}
"""The layer, and what the stack around it has that is not Stack's default."""

LATER = ("gated_mlp", "h3", "laminarnet", "s4", "serriformnet")
SSM_LAYERS = ("mamba", "s4", "s4d", "s5")  # what has a place in h3 and gated_mlp
KINDS = ("encoder_decoder", "decoder", "encoder")  # of transformer
OURS = {"num_heads": "n_heads", "num_layers": "n_layers", "max_seq_len": "max_len"}  # documented name -> the name of the argument


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
    """architecture: lot, mamba, s4d, s5, transformer (with architecture_kwargs={"kind": "decoder"}). layer_kwargs: arguments of the layer,
    architecture_kwargs: of the stack around it; both win over the other arguments and are left as they are. ssm_layer: the layer inside of
    architectures that have a place for one. d_state counts for state spaces, max_seq_len where positions are learned. ValueError for what
    does not exist. `initialise(model, seed)` makes the weights those of a seed.
    """
    if architecture in LATER:
        raise ValueError(f"create_model: architecture {architecture} is not there yet; there are {', '.join(ARCHITECTURES)}")
    _expect("architecture", architecture, tuple(ARCHITECTURES))
    if ssm_layer is not None:
        _expect("ssm_layer", ssm_layer, SSM_LAYERS)
        if ssm_layer != architecture:
            raise ValueError(f"create_model: {architecture} has no place for an ssm_layer, got {ssm_layer}; leave it out")
    layer, defaults = ARCHITECTURES[architecture]
    takes = _arguments(layer) - {"d_model"}
    of_layer = _checked("layer_kwargs", layer_kwargs, takes)
    with_kind = {"kind"} if architecture == "transformer" else set()
    of_stack = _checked("architecture_kwargs", architecture_kwargs, _arguments(Stack) - {"mixer", "pattern"} | with_kind)
    if with_kind:
        kind = of_stack.pop("kind", "encoder_decoder")
        _expect("kind", kind, KINDS)
        if kind != "decoder":
            raise ValueError(f'create_model: a transformer of kind {kind} is not there yet; architecture_kwargs={{"kind": "decoder"}} is')

    check_at_least("create_model", 1, d_model=d_model, num_layers=num_layers)
    if not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise ValueError(f"create_model: dropout={dropout!r} must be a number from 0 to 1")
    general = {"vocab_size": vocab_size, "d_model": d_model, "n_layers": num_layers, "max_len": max_seq_len, "dropout": dropout}
    arguments = {**general, **defaults, **of_stack}
    if arguments["vocab_size"] is None:
        arguments["tied"] = of_stack.get("tied", False)
    offered = {"d_state": d_state, "n_layers": arguments["n_layers"]}
    mixer = partial(layer, **{name: value for name, value in offered.items() if name in takes} | of_layer)
    return Stack(mixer=mixer, **arguments)


def _arguments(callable_: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(callable_).parameters)


def _checked(what: str, given: Mapping[str, Any] | None, valid: Collection[str]) -> dict[str, Any]:
    """A copy, with the names of the arguments for the documented ones."""
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"create_model: {what} must be a dict of arguments, got {given!r}")
    ours: dict[str, Any] = {}
    for documented, value in (given or {}).items():
        name = OURS.get(documented, documented)
        _expect(what, name, valid)
        if name in ours:
            raise ValueError(f"create_model: {what} has {name} twice, under two names")
        ours[name] = value
    return ours


def _expect(what: str, name: Any, valid: Collection[str]) -> None:
    if not isinstance(name, str) or name not in valid:
        near = nearest(str(name), valid)
        meant = f"; did you mean {near}?" if near else ";"
        raise ValueError(f"create_model: {what} {name} does not exist{meant} valid: {', '.join(sorted(valid))}")
