"""SerriformNet by its documented constructor: the stack of `model=serriform`, in plain Python.

    model = SerriformNet(vocab_size=50257, dim=512, num_layers=12, arch_config={"use_moe": False, "conv_kernel_size": 5})

What the documentation calls past_key_values is the state: model.prefill(prompt) returns it, model.step(token, state) goes on with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from lab.config.errors import hint
from lab.layers import MoE
from lab.mixers import Serriform
from lab.models.stack import Stack

GIVEN = {"d_model", "layer"}  # by the stack
OF_MIXER = {name: parameter for name, parameter in inspect.signature(Serriform).parameters.items() if name not in GIVEN}
OF_MOE = {name: parameter for name, parameter in inspect.signature(MoE).parameters.items() if name not in GIVEN}
KEYS = {"rope_mode", "use_moe", *OF_MIXER, *OF_MOE}  # of arch_config


class SerriformNet(Stack):
    """arch_config: arguments of `lab.mixers.Serriform` and of `lab.layers.MoE`, use_moe, and rope_mode, gate or rotate; those that are left
    out keep their defaults, and it is left as it is. Its activation is that of the experts, too; its d_ff is their width, which is dim
    where it is left out. dropout: on the embedding and on the branches of a block; arch_config has one for inside of the mixer. A sequence
    longer than max_seq_len is an error; None is no limit. ValueError for a name that does not exist, with the nearest one."""

    def __init__(
        self,
        vocab_size: int | None,
        dim: int = 512,
        num_layers: int = 12,
        max_seq_len: int | None = 1024,
        dropout: float = 0.1,
        arch_config: Mapping[str, Any] | None = None,
    ) -> None:
        if arch_config is not None and not isinstance(arch_config, Mapping):
            raise ValueError(f"SerriformNet: arch_config must be a dict of arguments, got {arch_config!r}")
        options = dict(arch_config or {})
        for name, value in options.items():
            if name not in KEYS:
                raise ValueError(f"SerriformNet: arch_config {name} does not exist{hint(str(name), KEYS)}")
            switch = name == "use_moe" or (name in OF_MIXER and isinstance(OF_MIXER[name].default, bool))
            if switch and not isinstance(value, bool):
                raise ValueError(f"SerriformNet: arch_config {name}={value!r} must be True or False")
        rope_mode = options.get("rope_mode", "gate")
        if rope_mode not in ("gate", "rotate"):
            raise ValueError(f"SerriformNet: rope_mode={rope_mode!r}; expected gate or rotate")
        moe = partial(MoE, **{"d_ff": dim} | {name: value for name, value in options.items() if name in OF_MOE})
        super().__init__(
            vocab_size,
            dim,
            num_layers,
            partial(Serriform, **{name: value for name, value in options.items() if name in OF_MIXER}),
            d_ff=0,
            dropout=dropout,
            max_len=max_seq_len,
            position=rope_mode,
            norm="rms",
            feed_forward=moe if options.get("use_moe", True) else None,
        )
