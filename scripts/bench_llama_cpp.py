"""Tokens per second of Mamba in lab and in llama.cpp, the same weights, in turn: 4 layers, d_model 256, vocabulary 256, float32, batch 1.

    python scripts/bench_llama_cpp.py LLAMA_BENCH [--repeats 5] [--threads 1] [--json FILE]

LLAMA_BENCH: llama.cpp's own benchmark, of a build of your own, for the processor at hand:
    cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON && cmake --build build --target llama-bench
Its sources: github.com/ggml-org/llama.cpp, or vendor/llama.cpp in the archive of `pip download --no-binary :all: llama-cpp-python`.

A round is one llama-bench, then as much in lab: 2,048 tokens behind nothing (lab: behind one token), then a prompt of 1,024. Wall clock, as
llama-bench measures; so the machine must have nothing else to do. llama-bench decodes tokens drawn at random and chooses none: lab's
`generate` does, greedily. Needs `pip install gguf`, which writes the weights in llama.cpp's format.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark
import torch
from bench_decoding import make
from bench_models import QUICK, SIZES, VOCABULARY
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lab.files import write_json
from lab.models import Stack
from lab.models.base import evaluating

NAMES = {
    "norm1.weight": "attn_norm.weight", "mixer.in_proj.weight": "ssm_in.weight", "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias", "mixer.x_proj.weight": "ssm_x.weight", "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias", "mixer.A_log": "ssm_a", "mixer.D": "ssm_d", "mixer.out_proj.weight": "ssm_out.weight",
}  # fmt: skip
"""Of a block: lab's name -> llama.cpp's."""
OUTSIDE = {"embedding.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"}


def tensors(model: Stack) -> dict[str, Tensor]:
    """The weights by llama.cpp's names, as it wants them."""
    found = {}
    for name, value in model.state_dict().items():
        if name in OUTSIDE:
            found[OUTSIDE[name]] = value
            continue
        _, block, own = name.split(".", 2)
        value = -value.exp() if own == "mixer.A_log" else value.squeeze(1) if own == "mixer.conv1d.weight" else value
        found[f"blk.{block}.{NAMES[own]}"] = value
    return {name: value.float().contiguous() for name, value in found.items()}


def write_gguf(model: Stack, file: Path) -> None:
    import gguf

    weights = tensors(model)
    d_inner, d_state = weights["blk.0.ssm_a"].shape
    writer: Any = gguf.GGUFWriter(str(file), "mamba")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(model.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(len(model.blocks))
    writer.add_ssm_conv_kernel(weights["blk.0.ssm_conv1d.weight"].shape[1])
    writer.add_ssm_inner_size(d_inner)
    writer.add_ssm_state_size(d_state)
    writer.add_ssm_time_step_rank(weights["blk.0.ssm_dt.weight"].shape[1])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(0)  # all float32
    for name, value in weights.items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def theirs(program: str, file: Path, tokens: int, threads: int) -> dict[str, float]:
    """Tokens per second of one llama-bench; half as many tokens of prompt, as in `ours`."""
    command = [program, "-m", str(file), "-t", str(threads), "-p", str(tokens // 2), "-n", str(tokens), "-r", "1", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench_llama_cpp: {program} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return {"decoding" if row["n_gen"] else "prefill": row["avg_ts"] for row in json.loads(done.stdout)}


def ours(model: Stack, tokens: int) -> dict[str, float]:
    prompt = torch.zeros(1, tokens // 2, dtype=torch.long)

    def rate(count: int, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return count / (time.perf_counter() - start)

    return {
        "decoding": rate(tokens, lambda: model.generate(prompt[:, :1], tokens)),
        "prefill": rate(tokens // 2, lambda: model(prompt, want=("state", "last"))),
    }


def main() -> None:
    parser = benchmark.arguments(__doc__.splitlines()[0])
    parser.add_argument("program", metavar="LLAMA_BENCH", help="llama.cpp's benchmark, built here")
    parser.set_defaults(allocator="default")
    args = parser.parse_args()
    model, tokens = make("mamba", *(QUICK if args.quick else SIZES)), 16 if args.quick else 2048

    def rows(allocator: str) -> dict[str, list[benchmark.Row]]:
        with tempfile.TemporaryDirectory() as folder, evaluating(model):
            file = Path(folder) / "mamba.gguf"
            try:
                write_gguf(model, file)
            except ModuleNotFoundError as error:
                raise SystemExit(f"bench_llama_cpp: {benchmark.missing(error)}") from None
            ours(model, tokens)
            rounds = [(theirs(args.program, file, tokens, args.threads), ours(model, tokens)) for _ in range(args.repeats)]
        found = []
        for what in ("decoding", "prefill"):
            ratios = [mine[what] / other[what] for other, mine in rounds]
            medians = [statistics.median(side[what] for side in sides) for sides in zip(*rounds, strict=True)]
            found.append(
                {"name": what, "llama_cpp": medians[0], "lab": medians[1]}
                | {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
            )
        return {"rows": found}

    report = benchmark.report(benchmark.with_allocator(args.allocator, args.threads, rows), args.threads)
    table = Table("", "llama.cpp", "lab", "ratio", title=f"tokens/s, medians of {args.repeats} rounds")
    for row in report["rows"]:
        ratio = f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
        table.add_row(row["name"], f"{row['llama_cpp']:.0f}", f"{row['lab']:.0f}", ratio)
    Console(width=120).print(table)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
