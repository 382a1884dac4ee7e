"""Tokens per second of all models, token by token: compiled (lab/ops/program.py), by the model's own step, and by other packages.

    python scripts/bench_decoding.py [--threads 1] [--repeats 5] [--only NAME] [--json FILE]
    python scripts/bench_decoding.py --against attention --only serriform     from which position on it is faster

4 layers, d_model 256, vocabulary 256, float32, batch 1, greedy. A side decodes TOKENS tokens behind the same state, in one process, in
turn; medians of the process CPU time. The state at a position comes from a prefill in chunks; from 10,000 on all but Mamba's are drawn at
random: the time does not depend on the numbers, and they take long to compute. `generate` is the whole call behind a prompt of 16 tokens,
with all that it prepares; the bound is the rate at which the weights, as float32, can be read here once for a token. Prefill: the logits
of the last token alone.
serriform has an MLP, or four experts of which a token goes to two, of the width with which it has as many parameters as attention.
Peers: pip install .[bench]; a row whose peer is missing says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import benchmark
import torch
from bench_models import QUICK, SIZES, VOCABULARY, MambapyLayer, Transformers, swapped
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lab import ops
from lab.analysis import measuring
from lab.analysis.profile import compiled_steps, eager_steps
from lab.files import write_json
from lab.layers import MoE
from lab.mixers import Attention, GatedMLP, H3Layer, Lattice, MambaLayer, S4DLayer, S4Layer, S5Layer, Serriform
from lab.models import Stack, initialise
from lab.models.base import evaluating
from lab.ops import native
from lab.ops.interpreter import Loaded
from lab.ops.program import Program

TOKENS, CHUNK = 32, 2048
CROSSING = [256, 512, 1024, 2048, 4096, 8192]  # positions of --against
SSM: dict[str, Any] = {"d_ff": 0}
MODELS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "mamba": (partial(MambaLayer, n_layers=4), {"d_ff": 0, "norm": "rms", "tied": True}),
    "s4": (S4Layer, SSM),
    "s4d": (S4DLayer, SSM),
    "s5": (S5Layer, SSM),
    "h3": (H3Layer, {}),
    "gated_mlp with s4d": (partial(GatedMLP, ssm_layer=S4DLayer), SSM),
    "attention": (partial(Attention, n_heads=8), {}),
    "lattice": (partial(Lattice, n_heads=8), {}),
    "serriform": (Serriform, {"norm": "rms", "position": "gate"}),
    "serriform with experts": (Serriform, {"norm": "rms", "position": "gate"}),
}
WIDE: dict[str, Callable[[int], dict[str, Any]]] = {  # what has the width that makes up for a smaller mixer
    "serriform": lambda width: {"d_ff": width},
    "serriform with experts": lambda width: {"d_ff": 0, "feed_forward": partial(MoE, d_ff=width)},
}


def make(name: str, d_model: int, n_layers: int, **more: Any) -> Stack:
    mixer, options = MODELS[name]
    if name in WIDE and not more:
        more = WIDE[name](matched(name, d_model, n_layers))
    model = Stack(VOCABULARY, d_model, n_layers, mixer, **{"position": "none", **options, **more})
    initialise(model, 0)
    return model.eval()


def matched(name: str, d_model: int, n_layers: int) -> int:
    """The width with which a model has as many parameters as attention."""
    one, two = (parameters(make(name, d_model, n_layers, **WIDE[name](width))) for width in (1, 2))
    return 1 + round((parameters(make("attention", d_model, n_layers)) - one) / (two - one))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def state_at(model: Stack, position: int) -> Any:
    if position < 10_000 or all(isinstance(mixer, MambaLayer) for mixer in model.mixers):
        tokens = torch.randint(0, VOCABULARY, (1, position), generator=torch.Generator().manual_seed(0))
        state = None
        for chunk in tokens.split(CHUNK, 1):
            state = model(chunk, state, want=("state", "last")).state
        return state
    state = model.map_state(lambda t: torch.rand(t.shape) if t.is_floating_point() else t + position, model.init_state(1))
    for layer in state["layers"]:
        layer |= {name: torch.randn(1, position, *layer[name].shape[2:]) for name in ("k", "v") if name in layer}
    return state


# ---- the peers' own steps, with the weights of lab's model


def mambapy_steps(model: nn.Module) -> Callable[[], object]:
    theirs: Any = swapped(MambapyLayer, model)

    def steps() -> object:
        token = torch.zeros(1, dtype=torch.long)
        caches = [(None, torch.zeros(1, b.mixer.block.conv1d.in_channels, b.mixer.block.config.d_conv - 1)) for b in theirs.blocks]
        for _ in range(TOKENS):
            x = theirs.embedding(token)
            for i, block in enumerate(theirs.blocks):
                y, caches[i] = block.mixer.block.step(block.norm1(x), caches[i])
                x = x + y
            token = theirs.head(theirs.norm(x)).argmax(-1)
        return token

    return steps


def transformers_steps(model: nn.Module) -> Callable[[], object]:
    theirs = Transformers(model).eval().model

    def steps() -> object:
        token, cache = torch.zeros(1, 1, dtype=torch.long), None
        for _ in range(TOKENS):
            out = theirs(token, cache_params=cache, use_cache=True)
            token, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.cache_params
        return token

    return steps


PEERS: dict[str, Callable[[nn.Module], Callable[[], object]]] = {
    benchmark.version("mambapy"): mambapy_steps,
    benchmark.version("transformers"): transformers_steps,
}


def by_position(names: list[str], positions: list[int], sizes: tuple[int, int], repeats: int) -> Iterator[benchmark.Row]:
    for name in names:
        for position in positions:
            model = make(name, *sizes)
            state = state_at(model, position)
            print(f"{name} at {position}", file=sys.stderr)
            row: benchmark.Row = {"name": name, "position": position}
            sides = {"compiled": compiled_steps(model, state, TOKENS), "eager": eager_steps(model, state, TOKENS)}
            if name == "mamba" and position == positions[0]:
                for peer, steps in PEERS.items():
                    try:
                        sides[peer] = steps(make(name, *sizes))
                    except ModuleNotFoundError as error:
                        row[peer] = benchmark.missing(error)
            rates = per_second(measuring.in_turn(sides, repeats), TOKENS)
            yield row | rates | {"ratio": rates["compiled"] / rates["eager"]}


def whole_calls(names: list[str], sizes: tuple[int, int], new: int, repeats: int) -> Iterator[benchmark.Row]:
    for name in names:
        model, prompt = make(name, *sizes), torch.zeros(1, 16, dtype=torch.long)

        def call(backend: str, n: int, temperature: float = 0.0, model: Stack = model, prompt: Tensor = prompt) -> object:
            with ops.use(decode=backend):
                return model.generate(prompt, n, temperature=temperature)

        few = max(1, new // 8)  # the slow side decodes fewer
        sides = {"greedy": partial(call, "native", new), "sampled": partial(call, "native", new, 1.0), "eager": partial(call, "torch", few)}
        timings = measuring.in_turn(sides, repeats)
        rates = {side: (few if side == "eager" else new) * 1e3 / timing.ms for side, timing in timings.items()}
        yield {"name": name, "new": new, **rates, "ratio": rates["greedy"] / rates["eager"]}


def bound(sizes: tuple[int, int], repeats: int) -> benchmark.Row:
    """How often a second all weights of the Mamba model can be read, by a product with one matrix of as many numbers."""
    weights = parameters(make("mamba", *sizes))
    p = Program(1, 1)
    product = p.linear(torch.randn(weights // 256, 256), p.constant(torch.randn(256)))
    run, token = Loaded(p.ends(product, torch.zeros(1))), torch.zeros(1, dtype=torch.long)

    def read() -> object:
        run.left = 1
        return run.step(token)

    ms = measuring.in_turn({"read": read}, repeats)["read"].ms
    return {"bytes": 4 * weights, "tokens_per_second": 1e3 / ms, "gigabytes_per_second": 4e-6 * weights / ms}


def prefill(names: list[str], sizes: tuple[int, int], length: int, repeats: int) -> Iterator[benchmark.Row]:
    for name in names:
        model, tokens = make(name, *sizes), torch.randint(0, VOCABULARY, (1, length))
        timing = measuring.in_turn({name: partial(model, tokens, want=("state", "last"))}, repeats)[name]
        yield {"name": name, "length": length, "ms": timing.ms, "spread": timing.spread}


def crossing(rows: list[benchmark.Row], one: str, other: str, side: str) -> str:
    """From which position on one model is faster than the other."""
    rates = {(row["name"], row["position"]): row[side] for row in rows}
    places = sorted({position for _, position in rates})
    faster = [position for position in places if rates[one, position] > rates[other, position]]
    ratios = ", ".join(f"{rates[one, position] / rates[other, position]:.2f} at {position:,}" for position in places)
    always = [position for position in faster if all(later in faster for later in places if later >= position)]
    said = f"from {always[0]:,} on" if always else "nowhere here"
    return f"{side}: {one} is faster than {other} {said} ({ratios})"


def per_second(timings: Mapping[str, measuring.Timing], tokens: int) -> dict[str, float]:
    return {side: tokens * 1e3 / timing.ms for side, timing in timings.items()}


def main() -> None:
    parser = benchmark.arguments(__doc__.splitlines()[0])
    parser.add_argument("--against", choices=MODELS, help="steps alone of this model and of --only, at positions up to 8,192")
    parser.set_defaults(allocator="default")
    args = parser.parse_args()
    sizes = QUICK if args.quick else SIZES
    positions, new, length = ([5, 40], 8, 16) if args.quick else ([100, 10_000, 100_000], 1024, 1024)
    if native.LIBRARY is None:
        raise SystemExit(f"bench_decoding: {native.SAYS}; there is nothing to compare")
    names = [name for name in MODELS if args.only in name]
    if args.against:
        names = [*dict.fromkeys([*names, args.against])]
        positions = positions if args.quick else CROSSING

    def rows(allocator: str) -> dict[str, list[benchmark.Row]]:
        with evaluating(nn.Identity()):
            if args.against:
                return {"positions": list(by_position(names, positions, sizes, args.repeats))}
            return {
                "bound": [bound(sizes, args.repeats)],
                "positions": list(by_position(names, positions, sizes, args.repeats)),
                "generate": list(whole_calls(names, sizes, new, args.repeats)),
                "prefill": list(prefill(names, sizes, length, args.repeats)),
            }

    report = benchmark.report(benchmark.with_allocator(args.allocator, args.threads, rows), args.threads)
    steps = Table("model", "position", "compiled", "eager", "compiled / eager", *PEERS, title="tokens/s, steps alone")
    for row in report["positions"]:
        peers = [said if isinstance(said := row.get(peer), str) else benchmark.said(said) for peer in PEERS]
        ours = [f"{row['compiled']:.0f}", f"{row['eager']:.0f}", f"{row['ratio']:.1f}"]
        steps.add_row(row["name"], str(row["position"]), *ours, *peers)
    if args.against:
        Console(width=160).print(steps)
        for name in names[:-1]:
            print(f"{name}: {parameters(make(name, *sizes)):,} parameters, {args.against}: {parameters(make(args.against, *sizes)):,}")
            for side in ("compiled", "eager"):
                print(crossing(report["positions"], name, args.against, side))
        if args.json:
            write_json(args.json, report)
        return
    calls = Table("model", "new tokens", "greedy", "sampled", "eager", "greedy / eager", title="tokens/s of generate, all included")
    for row in report["generate"]:
        calls.add_row(row["name"], str(row["new"]), *(f"{row[side]:.0f}" for side in ("greedy", "sampled", "eager")), f"{row['ratio']:.1f}")
    chunks = Table("model", "tokens", "ms", title="prefill")
    for row in report["prefill"]:
        chunks.add_row(row["name"], str(row["length"]), f"{row['ms']:.0f} ± {row['spread']:.0%}")
    limit = report["bound"][0]
    Console(width=160).print(steps, calls, chunks)
    print(
        f"bound: {limit['bytes'] / 1e6:.2f} MB of float32 can be read {limit['tokens_per_second']:.0f} times a second "
        f"({limit['gigabytes_per_second']:.1f} GB/s)"
    )
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
