"""What is done with models and runs from outside. The names are lazy: importing this imports neither torch nor matplotlib."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lab.analysis.plots import plot_attention, plot_delimiter_wave, plot_history

_HOME = {
    "plot_attention": "plots",
    "plot_delimiter_wave": "plots",
    "plot_history": "plots",
}
__all__ = ["plot_attention", "plot_delimiter_wave", "plot_history"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
