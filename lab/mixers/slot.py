"""What H3, the gated MLP and Mamba share: a slot, in which another mixer, mostly a state space, does what needs more than one token.

The slot takes an `ssm_layer`, called as ssm_layer(d_model=width). A layer that can be the state space alone is so in a slot: S4Layer,
S4DLayer and S5Layer get mixing=False there, unless the caller has said otherwise, as partial(S4DLayer, mixing=True) does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lab.mixers.base import Mixer, Output, State


class Slotted(Mixer):
    """A mixer with a slot. State: {"ssm": state of what is in the slot, ...}, as far as the slot is not empty."""

    ssm: Mixer | None

    def put(self, ssm_layer: Callable[..., Mixer] | None, d_model: int) -> None:
        """Fills the slot with a layer of that width; None leaves it empty. What the layer cannot do, this mixer cannot do either."""
        self.ssm = None
        if ssm_layer is None:
            return
        options: dict[str, Any] = {"d_model": d_model}
        if "mixing" in inspect.signature(ssm_layer).parameters and "mixing" not in getattr(ssm_layer, "keywords", {}):
            options["mixing"] = False
        self.ssm = ssm_layer(**options)
        self.causal, self.loss_names = self.ssm.causal, self.ssm.loss_names

    def inside(self, x: Tensor, state: State, lengths: Tensor | None, want: tuple[str, ...]) -> Output:
        """x (B, L, width) through the layer in the slot."""
        assert self.ssm is not None
        out = self.ssm(x, state, lengths=lengths, want=want)
        return out if isinstance(out, Output) else Output(out)

    def reserve(self, state: State, n: int) -> State:
        return state if self.ssm is None else state | {"ssm": self.ssm.reserve(state["ssm"], n)}

    def derived_metrics(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {} if self.ssm is None else self.ssm.derived_metrics(losses)
