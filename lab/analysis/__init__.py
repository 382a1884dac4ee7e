"""What is done with models and runs from outside. The names are lazy: importing this imports neither torch nor matplotlib."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lab.analysis.expert_plots import plot_expert_history, plot_experts
    from lab.analysis.plots import plot_attention, plot_delimiter_wave, plot_history, plot_receptive_field
    from lab.analysis.state_space_plots import plot_responses, plot_selectivity, plot_spectrum, plot_time_steps
    from lab.analysis.strata_plots import plot_strata

_HOME = {
    "plot_attention": "plots",
    "plot_delimiter_wave": "plots",
    "plot_expert_history": "expert_plots",
    "plot_experts": "expert_plots",
    "plot_history": "plots",
    "plot_receptive_field": "plots",
    "plot_responses": "state_space_plots",
    "plot_selectivity": "state_space_plots",
    "plot_spectrum": "state_space_plots",
    "plot_strata": "strata_plots",
    "plot_time_steps": "state_space_plots",
}
__all__ = [
    "plot_attention",
    "plot_delimiter_wave",
    "plot_expert_history",
    "plot_experts",
    "plot_history",
    "plot_receptive_field",
    "plot_responses",
    "plot_selectivity",
    "plot_spectrum",
    "plot_strata",
    "plot_time_steps",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
