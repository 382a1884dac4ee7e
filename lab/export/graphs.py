"""What is exported of a model: functions of plain tensors, the state flat and named.

    sequence   tokens (B, L)           -> logits (B, L, V)
    prefill    tokens (B, L)           -> logits (B, L, V) and the state after the last token
    step       token (B,) and a state  -> logits (B, V) and the next state

A state is a pytree; its tensors are named by their path in it, such as layers.0.k, and the step returns them as next.layers.0.k, in the
same order. Nothing here knows a model: which axes are free is seen in the shapes that it returns for different batches and lengths.
Of an encoder-decoder

    sequence   source (B, S), tokens (B, L)   -> logits (B, L, V)
    encoder    source (B, S)                  -> the state before the first token
    decoder    tokens (B, L) and a state      -> logits (B, L, V) and the next state
    step       token (B,) and a state         -> logits (B, V) and the next state

A model without a recurrent form, whose `init_state` raises NotImplementedError, has the sequence graph alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lab.mixers import State
from lab.models import SequenceModel
from lab.training.run import RunError

BATCH, LENGTH, CACHE, SOURCE = "batch", "length", "cache", "source"  # free axes; cache: as many slots as tokens were seen
EXAMPLE = (2, 7)  # batch and length that the graphs are recorded with; a batch of 1 would be taken for a constant
SHORTEST = 4  # the smallest max_len with a length that is free


@dataclass(frozen=True)
class Spec:
    """A tensor that goes into a graph or comes out: an axis is a number, or the name of a free one."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    def document(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}


@dataclass(frozen=True)
class Graph:
    name: str  # sequence, prefill or step; encoder, decoder
    module: nn.Module  # positional tensors in, a tensor or a tuple of tensors out
    example: tuple[Tensor, ...]
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]


@dataclass(frozen=True)
class Exported:
    """The graphs of a model, the layout of its state and the state before the first token (None where init_state gives no tensors)."""

    graphs: tuple[Graph, ...]
    state: tuple[Spec, ...]
    initial: tuple[Any, ...] | None  # of each state tensor: a number that fills it, or the values of one row
    max_len: int | None
    max_source_len: int | None = None


class OfModel(nn.Module):
    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model


class SequenceGraph(OfModel):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)


class SourceSequenceGraph(OfModel):
    def forward(self, source: Tensor, tokens: Tensor) -> Tensor:
        return self.model(tokens, source=source)


class EncoderGraph(OfModel):
    def forward(self, source: Tensor) -> tuple[Tensor, ...]:
        return flatten(self.model.init_state(source.shape[0], source))


class PrefillGraph(OfModel):
    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        logits, state = self.model.prefill(tokens)
        return logits, *flatten(state)


class StepGraph(nn.Module):
    def __init__(self, model: SequenceModel, like: State) -> None:
        super().__init__()
        self.model = model
        self.spec = pytree.tree_structure(like)
        self.complex = [tensor.is_complex() for tensor in pytree.tree_leaves(like)]

    def forward(self, token: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        logits, after = self.model.step(token, self.whole(state))
        return logits, *flatten(after)

    def whole(self, state: Sequence[Tensor]) -> State:
        leaves = [torch.view_as_complex(t) if is_complex else t for t, is_complex in zip(state, self.complex, strict=True)]
        return pytree.tree_unflatten(leaves, self.spec)


class DecoderGraph(StepGraph):
    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        logits, after = self.model.prefill(tokens, self.whole(state))
        return logits, *flatten(after)


def flatten(state: State) -> tuple[Tensor, ...]:
    """The tensors of a state in order. A complex one becomes real, with an axis of 2 at its end: the formats have no complex inputs."""
    leaves = pytree.tree_leaves(state)
    strange = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    if strange:
        raise RunError(f"the state holds {type(strange[0]).__name__} ({strange[0]!r}) beside tensors; lab-export needs tensors alone")
    return tuple(torch.view_as_real(t) if t.is_complex() else t for t in leaves)


@torch.no_grad()
def graphs(model: SequenceModel) -> Exported:
    """The graphs of a model in eval mode on the CPU."""
    B, L = EXAMPLE
    if model.max_len is not None:
        if model.max_len < SHORTEST:
            raise RunError(f"the model was built with max_len={model.max_len}; a graph of free length needs {SHORTEST} or more")
        L = min(L, model.max_len)
    if model.takes_source:
        return source_graphs(model, B, L)
    sizes = (B, L), (B + 1, L), (B, L - 2)
    tokens = [torch.zeros(size, dtype=torch.long) for size in sizes]
    token_spec = Spec("tokens", (BATCH, LENGTH), "int64")
    logits = specs(["logits"], [(model(t),) for t in tokens], sizes)
    sequence = Graph("sequence", SequenceGraph(model).eval(), (tokens[0],), (token_spec,), logits)
    try:
        empty = [model.init_state(batch) for batch in (1, B)]
    except NotImplementedError:
        return Exported((sequence,), (), None, model.max_len)

    state = model.prefill(tokens[2])[1]
    names = [name(path) for path, _ in pytree.tree_flatten_with_path(state)[0]]
    after = specs([f"next.{n}" for n in names], [flatten(model.prefill(t)[1]) for t in tokens], sizes)
    prefill = Graph("prefill", PrefillGraph(model).eval(), (tokens[0],), (token_spec,), logits + after)
    layout = tuple(Spec(n, renamed(spec.shape, CACHE), spec.dtype) for n, spec in zip(names, after, strict=True))
    stepped = tuple(Spec(spec.name, renamed(spec.shape, f"{CACHE} + 1"), spec.dtype) for spec in after)
    step = Graph(
        "step",
        StepGraph(model, state).eval(),
        (tokens[0][:, 0], *flatten(state)),
        (Spec("token", (BATCH,), "int64"), *layout),
        (Spec("logits", logits[0].shape[:1] + logits[0].shape[2:], logits[0].dtype), *stepped),
    )
    given = all(pytree.tree_map(type, one) == pytree.tree_map(type, state) for one in empty)
    return Exported((sequence, prefill, step), layout, initial_values(*empty) if given else None, model.max_len)


def source_graphs(model: SequenceModel, B: int, L: int) -> Exported:
    """Those of an encoder-decoder."""
    longest = getattr(model, "encoder").max_len  # noqa: B009 (of a model that takes a source)
    if longest is not None and longest < SHORTEST:
        raise RunError(f"the encoder was built with max_len={longest}; a graph of free length needs {SHORTEST} or more")
    S = 6 if longest is None else min(6, longest)
    sizes = (B, L, S), (B + 1, L, S), (B, L - 2, S), (B, L, S - 1)
    tokens = [torch.zeros(b, n, dtype=torch.long) for b, n, _ in sizes]
    source = [torch.zeros(b, s, dtype=torch.long) for b, _, s in sizes]
    of_tokens, of_source = Spec("tokens", (BATCH, LENGTH), "int64"), Spec("source", (BATCH, SOURCE), "int64")
    states = [model.prefill(t, source=s)[1] for t, s in zip(tokens, source, strict=True)]
    names = [name(path) for path, _ in pytree.tree_flatten_with_path(states[0])[0]]
    logits = specs(["logits"], [(model(t, source=s),) for t, s in zip(tokens, source, strict=True)], sizes)
    before = specs(names, [flatten(model.init_state(len(s), s)) for s in source], sizes)
    after = specs(names, [flatten(state) for state in states], sizes)
    layout = tuple(Spec(spec.name, renamed(spec.shape, CACHE), spec.dtype) for spec in after)

    def longer(by: str) -> tuple[Spec, ...]:
        return tuple(Spec(f"next.{spec.name}", renamed(spec.shape, f"{CACHE} + {by}"), spec.dtype) for spec in after)

    state = flatten(states[2])
    on = tokens[0] if model.max_len is None else tokens[0][:, : model.max_len - (L - 2)]  # as many as there is room for behind the state
    one = Spec("logits", logits[0].shape[:1] + logits[0].shape[2:], logits[0].dtype)
    made = (
        Graph("sequence", SourceSequenceGraph(model), (source[0], tokens[0]), (of_source, of_tokens), logits),
        Graph("encoder", EncoderGraph(model), (source[0],), (of_source,), before),
        Graph("decoder", DecoderGraph(model, states[2]), (on, *state), (of_tokens, *layout), logits + longer(LENGTH)),
        Graph(
            "step", StepGraph(model, states[2]), (tokens[0][:, 0], *state), (Spec("token", (BATCH,), "int64"), *layout), (one, *longer("1"))
        ),
    )
    for graph in made:
        graph.module.eval()
    return Exported(made, layout, None, model.max_len, longest)


def name(path: tuple[Any, ...]) -> str:
    """The path of a leaf in a pytree: layers.0.k"""
    return ".".join(str(next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind))) for key in path) or "state"


def specs(names: Sequence[str], outputs: Sequence[Sequence[Tensor]], sizes: Sequence[tuple[int, ...]]) -> tuple[Spec, ...]:
    """Names the free axes of tensors by their sizes at pairs of batch and length: one, another batch, another length; with a source at
    triples, the last with another source."""
    found = []
    for name, *tensors in zip(names, *outputs, strict=True):
        shape: list[int | str] = []
        for axis, size in enumerate(zip(*(tensor.shape for tensor in tensors), strict=True)):
            kinds: dict[tuple[int, ...], int | str] = {(size[0],) * len(sizes): size[0]}
            kinds |= dict(zip(zip(*sizes, strict=True), (BATCH, LENGTH, SOURCE), strict=False))
            if size not in kinds:
                what = "(batch, length)" if len(sizes[0]) == 2 else "(batch, length, source)"
                raise RunError(f"axis {axis} of {name} has the sizes {size} at {what} {tuple(sizes)}; expected a fixed one or one of these")
            shape.append(kinds[size])
        found.append(Spec(name, tuple(shape), str(tensors[0].dtype).removeprefix("torch.")))
    return tuple(found)


def renamed(shape: tuple[int | str, ...], length: str) -> tuple[int | str, ...]:
    return tuple(length if axis == LENGTH else axis for axis in shape)


def initial_values(one: State, several: State) -> tuple[Any, ...]:
    """The state before the first token, for any batch: of each tensor a number that fills it, or the values of a row. Infinities and
    NaN, which JSON does not have, are texts that numpy reads."""
    values = []
    for row, rows in zip(flatten(one), flatten(several), strict=True):
        if not torch.equal(row.expand_as(rows), rows):
            raise RunError("init_state gives the rows of a batch different values; a manifest can only state one row for all")
        flat = row.flatten()
        constant = flat.numel() == 0 or bool((flat == flat[0]).all())
        values.append(written((flat[0].item() if flat.numel() else 0) if constant else row[0].tolist()))
    return tuple(values)


def written(value: Any) -> Any:
    if isinstance(value, list):
        return [written(inner) for inner in value]
    return value if math.isfinite(value) else str(value)
