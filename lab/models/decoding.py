"""What generate does behind the prompt, token by token: as one compiled program where the model has one, else by the model itself.

The op `decode` has two backends:
    native   the whole step in C++ (lab/ops/program.py, csrc/cpu/decode.cpp): float32 on the CPU, in eval mode, without hooks.
    torch    the model called once for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all

from lab.layers import FeedForward
from lab.mixers.base import Mixer, State
from lab.ops import native
from lab.ops.backend import Backend, Op
from lab.ops.interpreter import Loaded
from lab.ops.program import NotCompiled, Program

if TYPE_CHECKING:
    from lab.models.base import SequenceModel

AT_ONCE = 1 << 26  # multiply-adds that greedy decoding does in one call, 10 ms or so: a stream must not stutter


@dataclass(frozen=True, eq=False)
class Continuation:
    """n tokens after a prompt, whose last logits are `last` (B, V), and the state behind it. choose: logits (B, V) -> tokens (B,); None:
    the most probable ones."""

    model: SequenceModel
    state: State
    last: Tensor
    n: int
    choose: Callable[[Tensor], Tensor] | None = None

    def first(self) -> Tensor:
        return self.last.argmax(-1) if self.choose is None else self.choose(self.last)

    @cached_property
    def program(self) -> Program | str:
        """Or the reason why there is none."""
        if not len(self.last):
            return "the batch has no rows"
        if self.last.device.type != "cpu":
            return f"the model is on {self.last.device}, a program runs on the CPU"
        reason = native.why_not(self.last, dtypes=(torch.float32,)) or unsuited(self.model)
        if reason is not None:
            return reason
        program = Program(len(self.last), self.n - 1)
        try:
            logits = self.model.program(program, self.state)
        except NotCompiled as refused:
            return str(refused)
        return program.ends(logits, self.state["position"])


def decode(model: SequenceModel, state: State, last: Tensor, n: int, choose: Callable[[Tensor], Tensor] | None) -> Iterator[Tensor]:
    """The n tokens (B,), one after the other. The state is given up: it may be changed."""
    return DECODE(Continuation(model, state, last, n, choose))


def unsuited(model: nn.Module) -> str | None:
    """What about the modules of a model only its own `forward` can heed, or None."""
    from lab.models.base import SequenceModel  # which imports this module

    without = FeedForward.program, Mixer.program, SequenceModel.program
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if of_all._global_forward_hooks or of_all._global_forward_pre_hooks:
        return "all modules have hooks, which must see every step"
    for name, module in model.named_modules():
        what = f"{name or 'the model'} ({type(module).__name__})"
        if module.training:
            return f"{what} is in training mode"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{what} has hooks, which must see every step"
        if own := [attribute for attribute in vars(module) if callable(getattr(type(module), attribute, None))]:
            return f"{what} has a {own[0]} of its own"
        if getattr(type(module), "program", None) in without:
            return f"{type(module).__name__} has no program"
        if hasattr(module, "program") and (changed := changed_since(type(module), "program")):
            return f"{type(module).__name__} changes {changed} of a class whose program it inherits"
    return None


def changed_since(cls: type, method: str) -> str | None:
    """The first function that a class changes of the one from which it has `method`: then that may no longer say what the class does."""
    for inner in cls.__mro__:
        if method in vars(inner):
            return None
        members = {name: member for name, member in vars(inner).items() if name != "reset_parameters" and not name.startswith("__")}
        changed = [
            name for name, member in members.items() if callable(member) or isinstance(member, property | classmethod | staticmethod)
        ]
        if changed:
            return changed[0]
    return None


def native_backend(c: Continuation) -> Iterator[Tensor]:
    assert isinstance(c.program, Program)
    token, left = c.first(), c.n - 1
    yield token
    if not left:
        return
    loaded = Loaded(c.program)
    weights = sum(p.numel() for p in c.model.parameters())
    at_once = max(1, AT_ONCE // (weights * len(token)))
    while left and c.choose is None:
        some = loaded.greedy(token, min(left, at_once)).unbind(0)
        yield from some
        token, left = some[-1], left - len(some)
    while left and c.choose is not None:
        token, left = c.choose(loaded.step(token)), left - 1
        yield token


def torch_backend(c: Continuation) -> Iterator[Tensor]:
    token = c.first()
    yield token
    state = c.model.reserve(c.state, c.n - 1)
    for _ in range(c.n - 1):
        out = c.model(token[:, None], state, want=("state", "in_place"))
        last, state = out.y[:, 0], out.state
        token = last.argmax(-1) if c.choose is None else c.choose(last)
        yield token


def example() -> tuple[Any, ...]:
    from lab.mixers import MambaLayer
    from lab.models.stack import Stack

    torch.manual_seed(0)
    with torch.device("cpu"):  # where numbers are drawn for a device that is not there, too
        model = Stack(11, 8, 1, MambaLayer, d_ff=0, position="none")
    for module in model.eval().modules():  # Module.to cannot move tensors without numbers, which lab-doctor asks with
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().to(torch.get_default_device()), requires_grad=False))
    return (Continuation(model, model.init_state(2), torch.zeros(2, 11), 5),)


DECODE = Op(
    "decode",
    (
        Backend("native", native_backend, supports=lambda c: c.program if isinstance(c.program, str) else None),
        Backend("torch", torch_backend),
    ),
    example=example,
    result=lambda tokens: torch.stack(list(tokens)).float(),
)
