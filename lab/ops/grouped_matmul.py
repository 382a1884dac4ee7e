"""The rows of a matrix in groups, each group times a matrix of its own.      y_t = x_t W_e for the counts_e rows of group e

T = rows, in the order of their groups, E = groups, D, F = widths. A group may have no row. Rows behind the last group give zeros: how
many rows count is known to the tensor `counts` alone, so no shape depends on numbers, and torch.compile sees one operator.

Backends
    torch      a product for each group that has rows, over its contiguous slice.
    reference  the formula in a plain loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lab.ops.backend import Backend, Op, differentiable_once


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x (T, D), weight (E, D, F), counts (E,) integers with a sum of at most T -> y (T, F).

    Computes in the common dtype of x and weight, under autocast in that of autocast, as a linear layer does. Differentiable once.
    """
    if x.ndim != 2 or weight.ndim != 3 or weight.shape[1] != x.shape[1] or counts.shape != weight.shape[:1]:
        got = ", ".join(str(tuple(t.shape)) for t in (x, weight, counts))
        raise ValueError(f"grouped_matmul: expected x (T, D), weight (E, D, F) and counts (E,), got {got}")
    if counts.is_floating_point():
        raise ValueError(f"grouped_matmul: counts must be integers, got {counts.dtype}")
    dtype, device = torch.promote_types(x.dtype, weight.dtype), x.device.type
    if dtype != torch.float64 and not x.is_meta and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return GROUPED_MATMUL(x.to(dtype), weight.to(dtype), counts)


def groups(counts: Tensor) -> Iterator[tuple[int, slice]]:
    """Of each group that has rows: its number and its rows. Reads counts back, which on a GPU waits for it."""
    start = 0
    for e, n in enumerate(counts.tolist()):
        if n:
            yield e, slice(start, start + n)
        start += n


# Each backend maps x (T, D), weight (E, D, F), both of one dtype, and counts (E,) to y (T, F).


def reference(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    y = [row @ torch.zeros_like(weight[0]) for row in x]
    for e, rows in groups(counts):
        for t in range(rows.start, rows.stop):
            y[t] = x[t] @ weight[e]
    return torch.stack(y) if y else x.new_zeros(0, weight.shape[2])


@torch.library.custom_op("lab::grouped_matmul", mutates_args=())
def torch_backend(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[2])
    end = 0
    for e, rows in groups(counts):
        torch.mm(x[rows], weight[e], out=y[rows])
        end = rows.stop
    y[end:] = 0
    return y


@torch_backend.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("lab::grouped_matmul_backward", mutates_args=())
def backward_op(gy: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """gy (T, F) -> gradients of x, weight."""
    gx, gweight = x.new_empty(x.shape), weight.new_zeros(weight.shape)
    end = 0
    for e, rows in groups(counts):
        torch.mm(gy[rows], weight[e].T, out=gx[rows])
        torch.mm(x[rows].T, gy[rows], out=gweight[e])
        end = rows.stop
    gx[end:] = 0
    return gx, gweight


@backward_op.register_fake
def _(gy: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    return *backward_op(gy, *ctx.saved_tensors), None


differentiable_once("grouped_matmul", torch_backend, backward_op, _save, _backward, twice="reference")


def flops(x: Tensor, weight: Tensor, counts: Tensor) -> float:
    """As if all rows were in a group: how many are is known to the numbers alone."""
    return 2 * x.numel() * weight.shape[2]


GROUPED_MATMUL = Op(
    "grouped_matmul",
    (Backend("torch", torch_backend), Backend("reference", reference)),
    example=lambda: (torch.randn(9, 4), torch.randn(3, 4, 5), torch.tensor([2, 0, 5])),
    flops=flops,
)
