"""Finding where a value stopped being finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def first_non_finite(model: nn.Module, call: Callable[[], Any]) -> str:
    """Which tensor of the model is not finite, or else which module's output is the first not to be: runs `call()` once, with hooks."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not torch.isfinite(tensor).all():
            return f"the tensor {name}"
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def check(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            if not found and not all(torch.isfinite(tensor).all() for tensor in tensors):
                found.append(f"the output of module {name or 'model'}")

        return check

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself, while every module's output is finite"
