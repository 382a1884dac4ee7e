"""Embedding tables drawn from N(0, 0.02^2), for tokens and for positions."""

from torch import nn


class Embedding(nn.Embedding):
    """`nn.Embedding` starts at N(0, 1), which drowns everything a pre-norm block adds to the residual stream."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
