"""What a mixture of experts costs (lab/layers/moe.py, which sorts tokens by expert) beside other ways to compute the same.

    python scripts/bench_moe.py [--allocator default|reuse|both] [--threads 1] [--only NAME] [--json FILE]

dense loop: all tokens through all experts, one after the other, what was not chosen times 0. index_add loop: each expert gathers its
tokens and adds its results to their rows, the form of many public models. MLP: one of width top_k d_ff, so with the same multiplications
but no router, no sorting and no choice: what the rest costs. Measured as in scripts/bench_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import benchmark
import torch
from bench_ops import Case, measure, table
from rich.console import Console
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from lab.files import write_json
from lab.layers import MoE

NAMES = ("up", "down", "router.weight")
EXPERTS = (4, 8, 16)


def cases(quick: bool) -> list[Case]:
    T, D, width = (64, 16, 32) if quick else (4096, 256, 1024)
    found = []
    for E in EXPERTS:
        for backward in (False, True):
            found.append(case(T, D, width, E, 2, backward, {"dense loop": dense_loop, "index_add loop": index_add_loop}))
    return [*found, case(T, D, width, 8, 2, True, {"MLP": None})]


def case(T: int, D: int, width: int, E: int, k: int, backward: bool, peers: Mapping[str, Callable[..., Tensor] | None]) -> Case:
    def layer() -> MoE:
        return MoE(D, width, E, k)

    def inputs() -> list[Tensor]:
        parameters = dict(layer().named_parameters())
        return [torch.randn(1, T, D), *(parameters[name].detach() for name in NAMES)]

    moe = layer()

    def lab(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(moe, dict(zip(NAMES, parameters, strict=True)), (x,))

    def mlp(x: Tensor, up: Tensor, down: Tensor, router: Tensor) -> Tensor:
        return F.gelu(x @ up[:k].movedim(0, 1).flatten(1)) @ down[:k].flatten(0, 1)

    def other(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *parameters: form(x[0], *parameters, k)[None]

    return Case(
        f"E {E}, top_k {k}, {'forward + backward' if backward else 'forward'}",
        f"{T} tokens, D {D}, d_ff {width}",
        inputs,
        lab,
        {name: mlp if form is None else other(form) for name, form in peers.items()},
        backward,
        None if None in peers.values() else lambda y: y,
    )


def routed(x: Tensor, router: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weight, choice = torch.softmax(x @ router.T, -1).topk(k)
    return weight / weight.sum(-1, keepdim=True), choice


def dense_loop(x: Tensor, up: Tensor, down: Tensor, router: Tensor, k: int) -> Tensor:
    weight, choice = routed(x, router, k)
    share = torch.zeros(len(x), len(up)).scatter(1, choice, weight)
    y = torch.zeros_like(x)
    for e in range(len(up)):
        y = y + share[:, e, None] * (F.gelu(x @ up[e]) @ down[e])
    return y


def index_add_loop(x: Tensor, up: Tensor, down: Tensor, router: Tensor, k: int) -> Tensor:
    weight, choice = routed(x, router, k)
    y = torch.zeros_like(x)
    for e in range(len(up)):
        row, place = torch.where(choice == e)
        out = F.gelu(x[row] @ up[e]) @ down[e] * weight[row, place, None]
        y = y.index_add(0, row, out)
    return y


def main() -> None:
    args = benchmark.arguments(__doc__.splitlines()[0]).parse_args()
    chosen = [pair for pair in zip(cases(args.quick), cases(True), strict=True) if args.only in pair[0].name]

    def rows(allocator: str) -> dict[str, list[benchmark.Row]]:
        return {"rows": [{**row, "allocator": allocator} for pair in chosen for row in measure(*pair, {}, args.repeats)]}

    report = benchmark.report(benchmark.with_allocator(args.allocator, args.threads, rows), args.threads)
    Console(width=200).print(table(report["rows"]))
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
