"""lab: a workbench for sequence-model research. The public face is lazy: importing lab does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lab.models.create import create_model
    from lab.models.pretrained import load_pretrained, save_pretrained
    from lab.training.load import load
    from lab.training.python import train

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "load", "load_pretrained", "save_pretrained", "train"]
_HOME = {
    "create_model": "lab.models.create",
    "load": "lab.training.load",
    "load_pretrained": "lab.models.pretrained",
    "save_pretrained": "lab.models.pretrained",
    "train": "lab.training.python",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lab' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
