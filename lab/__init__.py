"""lab: a workbench for sequence-model research. The public face is lazy: importing lab does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lab.training.load import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module 'lab' has no attribute {name!r}")
    from lab.training.load import load

    return load
