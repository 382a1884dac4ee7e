"""The convention of a mixer: (B, L, D) -> (B, L, D) over time, with an explicit state.

`mixer(x)` gives the plain tensor; `mixer(x, want=("state", "losses"))` gives an `Output` with what was asked for. Everything goes
through `__call__`, so that hooks, `torch.compile`, FLOP counters and DDP see it. A new mixer writes `mix`; `forward` adds the convention.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lab.ops.backend import recording
from lab.ops.program import NotCompiled, Program, Value

State: TypeAlias = Any
"""A pytree (dicts, lists, tuples) of tensors, each with the batch first: it can be reordered, sliced and saved."""

WANT = ("state", "losses", "record", "in_place", "last")


class Output(NamedTuple):
    """What a mixer, block or model returns when `want` is not empty; a field that was not asked for is empty."""

    y: Tensor
    state: State = None
    losses: Mapping[str, Tensor] = {}  # named, unweighted scalars
    record: Mapping[str, Any] = {}  # diagnostics: tensors at mixer level, lists over the layers at model level
    means: Mapping[str, Tensor] = {}  # over real tokens, what losses are functions of; at model level (n_layers, ...)


def check_want(want: tuple[str, ...]) -> None:
    if isinstance(want, str) or any(name not in WANT for name in want):
        raise ValueError(f"want={want!r}: expected a tuple with names out of {', '.join(WANT)}")


def state_type(dtype: torch.dtype) -> torch.dtype:
    """What the state of a layer in `dtype` is computed and kept in, where half precision would lose it: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(state_type(x.dtype))


def check_at_least(owner: str, minimum: int, **values: int) -> None:
    """ValueError for the first of the named arguments that is smaller, or no integer."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{owner}: {name}={value!r} must be an integer")
        if value < minimum:
            raise ValueError(f"{owner}: {name}={value} must be at least {minimum}")


def check_time_steps(owner: str, dt_min: float, dt_max: float, rate: float = 1.0) -> None:
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(f"{owner}: dt_min={dt_min} and dt_max={dt_max} must be above 0, and dt_max not below dt_min")
    if not 0 < rate < math.inf:
        raise ValueError(f"{owner}: rate={rate} must be above 0")


class Mixer(nn.Module, ABC):
    """Mixes a sequence over time. Nothing a call does is kept on the module: the state goes in and comes out."""

    loss_names: tuple[str, ...] = ()  # the auxiliary losses that `want=("losses",)` returns
    causal: bool = True  # False: y depends on later tokens too, so there is no state, no step and no next-token task
    takes_mask: bool = False  # whether `mix` has an argument `mask`
    d_model: int | None = None  # D, where x should be checked

    def forward(
        self,
        x: Tensor,
        state: State = None,
        *,
        lengths: Tensor | None = None,
        want: tuple[str, ...] = (),
        mask: Tensor | None = None,
    ) -> Tensor | Output:
        """x (B, L, D), lengths (B,) real tokens of each right-padded row (None: all) -> y (B, L, D), or an Output with `want`.

        A returned state stands after the last real token of each row; y at padded positions has no meaning. "in_place" allows the
        mixer to write into the tensors of `state`: only for a caller that made the state and gives it up. mask: of attention
        (lab/mixers/masks.py); another mixer refuses one.
        """
        check_want(want)
        if self.d_model is not None and not recording() and (x.ndim != 3 or x.shape[-1] != self.d_model):
            raise ValueError(f"{type(self).__name__}: x must be (B, L, {self.d_model}), got {tuple(x.shape)}")
        if "state" in want:
            self.check_causal()
        if mask is not None and not self.takes_mask:
            raise ValueError(f"{type(self).__name__} is no attention: it takes no mask")
        out = self.mix(x, state, lengths, want, **({} if mask is None else {"mask": mask}))
        if not want:
            return out.y
        return Output(
            out.y,
            out.state if "state" in want else None,
            dict(out.losses) if "losses" in want else {},
            dict(out.record) if "record" in want else {},
        )

    @abstractmethod
    def mix(self, x: Tensor, state: State, lengths: Tensor | None, want: tuple[str, ...]) -> Output:
        """The mathematics. Fields of the Output that are not in `want` may be left empty; expensive ones should be."""

    def init_state(self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        """The state before the first token; device and dtype default to those of the parameters. None is one too: `mix` starts afresh."""
        return None

    def check_causal(self) -> None:
        """NotImplementedError for a mixer that reads the future, which `init_state` and want=("state",) of such a mixer raise."""
        if not self.causal:
            raise NotImplementedError(f"{type(self).__name__} reads the whole sequence, the future too, so it has no state and no step")

    @property
    def time_step_bias(self) -> nn.Parameter | None:
        """What a time step is the exponential or the softplus of, for a sampled state space; None for a mixer without one."""
        return None

    def reserve(self, state: State, n: int) -> State:
        """The same state with room for `n` more tokens, so that "in_place" steps can write into it. States of fixed size need none."""
        return state

    def program(self, p: Program, x: Value, state: State) -> Value:
        """One token, x of width D, as instructions of `p`, which continue `state`; the value that holds y. For decoding in C++
        (lab/ops/program.py); a model with a mixer that has none decodes in PyTorch."""
        raise NotCompiled(f"{type(self).__name__} has no program")

    def derived_metrics(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Metrics that follow from the (averaged, unweighted) losses and deserve a name of their own."""
        return {}
