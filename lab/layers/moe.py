"""A mixture of experts: a router sends each token to top_k of E small MLPs.   arXiv:2006.16668 (GShard), 2101.03961 (Switch), 2202.08906

    l = W_r x,   p = softmax(l + noise),   y = sum over the top_k largest e of  w_e W2_e act(W1_e x),   w = p / (sum of those top_k p)

With top_k = 1 w is p itself: divided by itself it would be 1, and the router would learn nothing from the output.
B = batch, L = length, T = B L tokens, D = d_model, F = d_ff, E = n_experts, k = top_k. The k T pairs (choice, token) are sorted by
expert, and each expert computes its own rows alone (`lab.ops.grouped_matmul`). Experts have no biases.

Losses, unweighted, over real tokens, f_e the fraction of the k T choices that fall on e, P_e the mean of softmax(l)_e without noise:
    balance   E sum_e f_e P_e: 1 when all experts are used alike, up to E; f has no gradient
    entropy   log E - H(P): 0 when P is uniform
    z         mean of logsumexp(l)^2: keeps the logits small
Means: what they are computed from, f and P (E,) and z (). Record: experts (B, L, k), the numbers of those chosen, and router (B, L, E),
softmax(l).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.layers.activation import ACTIVATIONS, Activation, check_activation
from lab.layers.feed_forward import FeedForward
from lab.mixers.base import Output, at_least_float32, check_at_least
from lab.ops.backend import exporting, without_autocast
from lab.ops.grouped_matmul import grouped_matmul
from lab.ops.program import Program, Value


class MoE(FeedForward):
    """d_ff: the width of each expert, None means 4 d_model. capacity_factor: in training an expert takes at most
    ceil(capacity_factor k T / E) of T real tokens, first choices before second ones, earlier tokens before later ones; beyond that the
    choice is dropped, and its share of y with it. None: no limit. Evaluation and decoding drop nothing. router_noise: the standard
    deviation of the noise on the logits, in training."""

    loss_names = ("balance", "entropy", "z")

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        n_experts: int = 4,
        top_k: int = 2,
        capacity_factor: float | None = None,
        router_noise: float = 0.0,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        d_ff = 4 * d_model if d_ff is None else d_ff
        check_at_least("MoE", 1, d_model=d_model, d_ff=d_ff, n_experts=n_experts, top_k=top_k)
        if top_k > n_experts:
            raise ValueError(f"MoE: top_k={top_k} must be at most n_experts={n_experts}, as a token goes to different experts")
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise ValueError(f"MoE: capacity_factor={capacity_factor} must be above 0, or None for no limit")
        if not 0 <= router_noise < math.inf:
            raise ValueError(f"MoE: router_noise={router_noise} must be 0 or more")
        check_activation("MoE", activation)
        self.d_model = d_model
        self.n_experts, self.top_k, self.capacity_factor, self.router_noise = n_experts, top_k, capacity_factor, router_noise
        self.activation = activation
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.up = nn.Parameter(torch.empty(n_experts, d_model, d_ff))
        self.down = nn.Parameter(torch.empty(n_experts, d_ff, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.up, self.down):  # as nn.Linear starts
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)

    def extra_repr(self) -> str:
        E, D, width = self.up.shape
        return f"d_model={D}, d_ff={width}, n_experts={E}, top_k={self.top_k}, activation={self.activation}"

    def feed(self, x: Tensor, lengths: Tensor | None, want: tuple[str, ...]) -> Output:
        B, L, D = x.shape
        tokens = x.reshape(-1, D)
        real = None if lengths is None else (torch.arange(L, device=x.device) < lengths.to(x.device)[:, None]).flatten()
        if real is not None:  # 0 times a NaN of the padding would be one in the gradients
            tokens = torch.where(real[:, None], tokens, 0)
        with without_autocast(x):  # bfloat16 has too few digits to choose by
            logits = F.linear(at_least_float32(tokens), at_least_float32(self.router.weight))
        noise = self.router_noise * torch.randn_like(logits) if self.training and self.router_noise else 0
        weight, choice = torch.softmax(logits + noise, -1).topk(self.top_k)  # (T, k)
        if self.top_k > 1:
            weight = weight / weight.sum(-1, keepdim=True)
        y = self.dense(tokens, logits, weight, choice) if exporting() else self.dispatch(tokens, weight, choice, real)
        means = self.means(logits, choice, real) if "losses" in want else {}
        record = {"experts": choice.view(B, L, -1), "router": logits.softmax(-1).view(B, L, -1)} if "record" in want else {}
        return Output(y.view(B, L, D).to(x.dtype), means=means, record=record)

    def dispatch(self, tokens: Tensor, weight: Tensor, choice: Tensor, real: Tensor | None) -> Tensor:
        """tokens (T, D), weight and choice (T, k), real (T,) or None for all -> y (T, D), 0 at padding."""
        T, E, k = len(tokens), self.n_experts, self.top_k
        expert = choice.T.flatten()  # (k T,): first choices before second ones
        if real is not None:
            expert = expert.where(real.repeat(k), E)  # nobody's: behind the others
        expert, order = expert.sort(stable=True)
        counts = torch.zeros(E + 1, dtype=torch.long, device=expert.device).scatter_add(0, expert, torch.ones_like(expert))
        if self.training and self.capacity_factor is not None:
            n = torch.full((), T, device=expert.device) if real is None else real.sum()
            limit = (n.double() * self.capacity_factor * k / E).ceil().long()
            place = torch.arange(k * T, device=expert.device) - (counts.cumsum(0) - counts)[expert]
            _, again = expert.where(place < limit, E).sort(stable=True)
            order, counts = order[again], counts.clamp(max=limit)
        counts = counts[:E]
        hidden = ACTIVATIONS[self.activation](grouped_matmul(tokens[order % T], self.up, counts))
        out = grouped_matmul(hidden, self.down, counts)
        back = torch.empty_like(order).scatter(0, order, torch.arange(k * T, device=order.device))  # where each pair stands
        return (out[back].view(k, T, -1) * weight.T[..., None]).sum(0)

    def dense(self, tokens: Tensor, logits: Tensor, weight: Tensor, choice: Tensor) -> Tensor:
        """The same for a file, in operators that every format has: all tokens through all experts, those not chosen times 0."""
        share = torch.zeros_like(logits).scatter(1, choice, weight)
        out = ACTIVATIONS[self.activation](tokens @ self.up) @ self.down  # (E, T, D)
        return (out * share.T[..., None]).sum(0)

    def program(self, p: Program, x: Value) -> Value:
        return p.experts(x, p.linear(self.router, x), self.up, self.down, self.top_k, self.activation)

    def means(self, logits: Tensor, choice: Tensor, real: Tensor | None) -> dict[str, Tensor]:
        chosen = torch.zeros_like(logits).scatter(1, choice, 1 / self.top_k)
        of_tokens = torch.cat([chosen, logits.softmax(-1), logits.logsumexp(-1, keepdim=True).square()], -1)  # (T, 2 E + 1)
        if real is None:
            mean = of_tokens.mean(0)
        else:
            mean = torch.where(real[:, None], of_tokens, 0).sum(0) / real.sum().clamp(min=1)
        f, P, z = mean.split((self.n_experts, self.n_experts, 1))
        return {"f": f.detach(), "P": P, "z": z[0]}

    def mean_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"f": (self.n_experts,), "P": (self.n_experts,), "z": ()}

    def losses(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        f, P = means["f"], means["P"]
        return {
            "balance": self.n_experts * (f * P).sum(-1),
            "entropy": math.log(self.n_experts) - torch.special.entr(P).sum(-1),
            "z": means["z"],
        }
