"""The weights of the auxiliary losses: a number each, or a number with a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lab.config import MistakeError
from lab.config.errors import hint
from lab.layers import MoE

Schedule = Literal["off", "ramp", "plateau"]


@dataclass(frozen=True)
class LossWeight:
    """`off` holds the value; `ramp` rises to it linearly over the first ramp_steps; `plateau` also falls back to 0 over the last."""

    value: float
    schedule: Schedule = "off"
    ramp_steps: int = 0

    def at(self, step: int, max_steps: int) -> float:
        """The weight at a step (0-based)."""
        factor = 1.0
        if self.schedule != "off" and self.ramp_steps:
            factor = min(1.0, step / self.ramp_steps)
            if self.schedule == "plateau":
                factor = min(factor, (max_steps - 1 - step) / self.ramp_steps)
        return self.value * max(factor, 0.0)


def parse_loss_weights(node: Mapping[str, Any], loss_names: tuple[str, ...], model: str) -> dict[str, LossWeight]:
    """The node loss_weights against the losses that the model declares; a loss without a weight gets 0 and is logged all the same."""
    weights = {name: LossWeight(0.0) for name in loss_names}
    for name, value in node.items():
        at = ("loss_weights", name)
        if name not in loss_names:
            advice = hint(name, loss_names, "it has") if loss_names else "; it has none"
            if name in MoE.loss_names:
                advice += "; feed_forward=moe gives it one, feed_forward=none takes its weight away"
            raise MistakeError(at, f"{model} has no auxiliary loss {name}{advice}")
        parts = value if isinstance(value, Mapping) else {"value": value}
        fields = LossWeight.__dataclass_fields__
        for key in parts:
            if key not in fields:
                raise MistakeError((*at, key), f"there is no such key{hint(key, fields)}")
        if "value" not in parts:
            raise MistakeError(at, "it has no value; a weight is a number or {value, schedule, ramp_steps}")
        for key in ("value", "ramp_steps"):
            number = parts.get(key, 0)
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise MistakeError((*at, key) if parts is value else at, f"expected a number, got {number!r}")
        weight = LossWeight(**parts)
        if weight.schedule not in get_args(Schedule):
            raise MistakeError((*at, "schedule"), f"expected {', '.join(get_args(Schedule))}, got {weight.schedule!r}")
        if weight.schedule != "off" and weight.ramp_steps < 1:
            problem = f"it must be at least 1 with schedule {weight.schedule}, got {weight.ramp_steps}"
            raise MistakeError((*at, "ramp_steps"), problem)
        weights[name] = weight
    return weights
