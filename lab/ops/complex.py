"""Complex arithmetic on pairs of real numbers, the last dimension (re, im): what an exported file can hold, and what a parameter is."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a, b (..., 2) -> a b"""
    (a_re, a_im), (b_re, b_im) = a.unbind(-1), b.unbind(-1)
    return torch.stack([a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re], -1)


def conjugate(a: Tensor) -> Tensor:
    return a * a.new_tensor([1.0, -1.0])


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a, b (..., 2) -> a / b"""
    return multiply(a, conjugate(b)) / b.square().sum(-1, keepdim=True)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """a, b (..., n, 2) -> sum_n a_n b_n over both of each pair of conjugates, 2 Re of it over one; the last dimensions are 1 and 1"""
    return 2 * (a[..., :1] * b[..., :1] - a[..., 1:] * b[..., 1:]).sum(-2, keepdim=True)


def exp(a: Tensor) -> Tensor:
    """a (..., 2) -> e^a"""
    re, im = a.unbind(-1)
    return torch.exp(re)[..., None] * torch.stack([im.cos(), im.sin()], -1)


def expm1(a: Tensor) -> Tensor:
    """a (..., 2) -> e^a - 1, exact near 0 as well"""
    re, im = a.unbind(-1)
    return torch.stack([torch.expm1(re) * im.cos() - 2 * (im / 2).sin().square(), torch.exp(re) * im.sin()], -1)
