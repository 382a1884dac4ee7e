"""Complex arithmetic on pairs of real numbers, the last dimension (re, im): what an exported file can hold, and what a parameter is."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a, b (..., 2) -> a b"""
    (a_re, a_im), (b_re, b_im) = a.unbind(-1), b.unbind(-1)
    return torch.stack([a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re], -1)


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a, b (..., 2) -> a / b"""
    return multiply(a, b * b.new_tensor([1.0, -1.0])) / b.square().sum(-1, keepdim=True)


def exp(a: Tensor) -> Tensor:
    """a (..., 2) -> e^a"""
    re, im = a.unbind(-1)
    return torch.exp(re)[..., None] * torch.stack([im.cos(), im.sin()], -1)


def expm1(a: Tensor) -> Tensor:
    """a (..., 2) -> e^a - 1, exact near 0 as well"""
    re, im = a.unbind(-1)
    return torch.stack([torch.expm1(re) * im.cos() - 2 * (im / 2).sin().square(), torch.exp(re) * im.sin()], -1)
