"""What a model costs: parameters, operations for a token, bytes of its state. Counted from shapes alone, on tensors without numbers.

Operations of a forward pass: those of matrix products, convolutions and attention, by torch's counter; of Fourier transforms; and of our
ops, each by the `flops` of its `Op`. A multiply-add is 2, a complex one 8, and inside of our ops every sine or exponential 1. A causal
attention counts as its full matrix, as in torch's counter. What is done element by element (norms, activations, gates) is not counted.
A sequence is alone in its batch, so a convolution's kernel, which a batch would share, is counted with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lab import ops
from lab.models import SequenceModel
from lab.models.base import evaluating
from lab.ops.backend import Backend, Op, unnoticed

BUILT_IN = ("aten", "prim", "prims")  # namespaces of operators that, without a formula, work element by element
SCALES = (1, 4, 16)  # lengths of the state in metrics.json, as multiples of task.seq_len


def params(model: SequenceModel) -> int:
    """Numbers that are learned; shared ones count once."""
    return sum(p.numel() for p in model.parameters())


def flops_per_token(model: SequenceModel, length: int) -> float:
    """Operations of a forward pass over one sequence of `length` tokens, for each of them; with a source of as many tokens where the model
    takes one. ValueError for an operator that has no formula."""
    counter = Counter()
    with _without_numbers(counter), counter:
        _run(model, length)
    return counter.total / length


def state_bytes(model: SequenceModel, length: int) -> int | None:
    """Bytes of the state after `length` tokens of one sequence, counters included; None of a model that has no state, or not so far."""
    if not model.causal or (model.max_len is not None and length > model.max_len):
        return None
    with _without_numbers(Counter()):
        return bytes_of(_run(model, length, ("state",)).state)


def bytes_of(state: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor))


def cost(model: SequenceModel, length: int) -> dict[str, Any]:
    """The "cost" of metrics.json: {"flops_per_token": number, "state_bytes": {"<length>": bytes} or null}."""
    sizes = {str(length * scale): state_bytes(model, length * scale) for scale in SCALES}
    return {
        "flops_per_token": flops_per_token(model, length),
        "state_bytes": {at: size for at, size in sizes.items() if size is not None} or None,
    }


class Counter(TorchDispatchMode):
    """Counts the operations of what is called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out, packet = func(*args, **(kwargs or {})), func._overloadpacket
        if self.paused:
            return out
        formula = FORMULAS.get(packet) or flop_registry.get(packet)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        elif func.namespace not in BUILT_IN:
            right = "an Op of lab.ops.backend has `flops`, another takes one by torch.utils.flop_counter.register_flop_formula"
            raise ValueError(f"cost: operator {packet} has no formula for its operations; {right}")
        return out

    def of_op(self, op: Op, *args: Any) -> Any:
        """What an op gives for arguments without numbers, its operations counted by its own formula."""
        assert op.flops is not None
        self.total += op.flops(*args)
        run = next((backend.run for backend in op.backends if backend.supports(*args) is None), None)
        if run is None:
            raise ValueError(f"cost: op {op.name} has no backend for tensors without numbers")
        before, self.paused = self.paused, True
        try:
            return run(*args)
        finally:
            self.paused = before


def _of_transform(x: Tensor, dim: list[int], *args: Any, out_val: Tensor, **kwargs: Any) -> float:
    """5/2 n log2 n for n real numbers, on one side or the other, and 5 n log2 n for complex ones."""
    numbers = x if out_val.is_complex() else out_val
    points = math.prod(numbers.shape[d] for d in dim)
    return (5 if numbers.is_complex() else 2.5) * numbers.numel() * math.log2(max(points, 1))


FORMULAS: dict[Any, Callable[..., float]] = {getattr(torch.ops.aten, name): _of_transform for name in ("_fft_r2c", "_fft_c2r", "_fft_c2c")}


@contextmanager
def _without_numbers(counter: Counter) -> Iterator[None]:
    """Within it ops tell shapes alone, nothing is compiled, and nobody notices."""
    counted: dict[str, Any] = {op.name: Backend("shapes", partial(counter.of_op, op)) for op in ops.every() if op.flops is not None}
    with unnoticed(), ops.use(**counted), torch.inference_mode(False), torch.compiler.set_stance("force_eager"):
        yield


def _run(model: SequenceModel, length: int, want: tuple[str, ...] = ()) -> Any:
    """The model on one sequence of no matter which tokens, its weights without their numbers."""

    def sequence() -> Tensor:
        options: dict[str, Any] = {"device": "meta"}
        if isinstance(model.embedding, torch.nn.Identity):
            return torch.empty(1, length, model.d_model, **options)
        return torch.empty(1, length, dtype=torch.long, **options)

    numbers = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights = {name: torch.empty_like(tensor, device="meta") for name, tensor in numbers.items()}
    given = {"source": sequence()} if model.takes_source else {}
    with evaluating(model):
        return functional_call(model, weights, (sequence(),), {**given, "want": want})
