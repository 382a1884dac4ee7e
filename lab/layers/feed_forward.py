"""The convention of a feed-forward, the second branch of a block: (B, L, D) -> (B, L, D), each token by itself, without a state.

`ff(x)` gives the plain tensor; `ff(x, want=("losses", "record"))` gives an `Output` with what was asked for. A new one writes `feed`;
`forward` adds the convention. A loss that is no mean over tokens itself, but a function of such means, is written as `losses(means)`: the
means of several processes can then be averaged before it is taken (lab/training/module.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from lab.mixers.base import Output, check_want
from lab.ops.backend import recording
from lab.ops.program import NotCompiled, Program, Value


class FeedForward(nn.Module, ABC):
    loss_names: tuple[str, ...] = ()  # the auxiliary losses that `want=("losses",)` returns
    d_model: int | None = None  # D, where x should be checked

    def forward(self, x: Tensor, *, lengths: Tensor | None = None, want: tuple[str, ...] = ()) -> Tensor | Output:
        """x (B, L, D), lengths (B,) real tokens of each right-padded row (None: all) -> y (B, L, D), or an Output with `want`.

        With "losses" the Output also has the means that they are computed from.
        """
        check_want(want)
        if self.d_model is not None and not recording() and (x.ndim != 3 or x.shape[-1] != self.d_model):
            raise ValueError(f"{type(self).__name__}: x must be (B, L, {self.d_model}), got {tuple(x.shape)}")
        out = self.feed(x, lengths, want)
        if not want:
            return out.y
        means = dict(out.means) if "losses" in want else {}
        record = dict(out.record) if "record" in want else {}
        return Output(out.y, losses=self.losses(means) if means else {}, record=record, means=means)

    @abstractmethod
    def feed(self, x: Tensor, lengths: Tensor | None, want: tuple[str, ...]) -> Output:
        """The mathematics: y, and with "losses" the means over real tokens, with "record" the diagnostics. y of padding has no meaning."""

    def mean_shapes(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the means."""
        return {}

    def losses(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses from the means of one layer, or of several, stacked in front: unweighted, one number for each layer."""
        return {}

    def program(self, p: Program, x: Value) -> Value:
        """One token, as of a mixer. For decoding in C++; a model with a feed-forward that has none decodes in PyTorch."""
        raise NotCompiled(f"{type(self).__name__} has no program")
