"""The benchmarks run at tiny sizes, with peers that are not installed: whether they measure, not what. One in
the fast suite for what they share, the others among the slow checks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.ops import native

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(tmp_path):
    """script("bench_ops", *arguments) -> what it printed and its JSON, without the peers even where they are installed."""
    for module in ("gguf", "laminarnet", "mambapy", "s5", "transformers"):
        (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError('No module named {module}', name='{module}')")
    paths = [str(tmp_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]

    def run(name, *arguments):
        file = tmp_path / f"{name}.json"
        command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), "--quick", "--repeats", "1", "--json", str(file), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads(file.read_text())

    return run


def test_ops(script):
    printed, report = script("bench_ops", "--allocator", "default")
    rows = {(row["name"], row["against"].split()[0]): row for row in report["rows"]}
    assert (
        rows["selective_scan", "mambapy"]["note"] == "not installed: pip install mambapy"
        and "ratio" not in rows["selective_scan", "mambapy"]
    )
    assert rows["linear_recurrence", "s5-pytorch"]["note"] == "not installed: pip install s5-pytorch"
    measured = [row for row in report["rows"] if "ratio" in row and row["against"] != "1 thread"]
    assert len(measured) >= 9
    for row in measured:
        assert row["lab_ms"] > 0 and row["peer_ms"] > 0 and row["ratio"] == row["peer_ms"] / row["lab_ms"]
        assert row["lab_mb"] >= 0 and row["peer_mb"] >= 0
        assert row["difference"] is None or row["difference"] < 1e-4 or "laminarnet" in row["against"], row  # its form is not exact
    assert {"cpu", "threads", "torch"} <= set(report["machine"]) and "not installed" in printed


@pytest.mark.slow
def test_models_and_the_page(script, tmp_path):
    _, report = script("bench_models", "--only", "mamba")  # both allocators
    assert {(row["against"].split()[0], row["allocator"], row["note"]) for row in report["rows"]} == {
        (peer, allocator, f"not installed: pip install {peer}")
        for peer in ("mambapy", "transformers")
        for allocator in ("default", "reuse")
    }
    assert [row["allocator"] for row in report["growth"]] == ["default", "reuse"]
    for row in report["growth"]:
        assert len(row["ms"]) == len(row["lengths"]) and all(ms > 0 for ms in row["ms"]) and row["time_exponent"] < 3
    script("bench_ops", "--only", "kuramoto")  # both too
    _, limits = script("bench_limits", "--allocator", "default", "--only", "mamba")
    assert all(row["rate"] > 0 for row in limits["limits"]) and limits["limits"][3]["against"] == "exponential"
    (step,) = limits["shares"]
    assert 0 < sum(step["shares"].values()) <= 1
    files = [str(tmp_path / f"{name}.json") for name in ("bench_ops", "bench_models", "bench_limits")]
    page = subprocess.run([sys.executable, ROOT / "scripts" / "bench_docs.py", *files], capture_output=True, text=True, check=True).stdout
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.count("|") == 3 for line in tables[:3]) and "| kuramoto_scan, B 2, L 4, H 8 | Python loop |" in page
    assert "pip install transformers" in page and page.count("| mamba |") == 7  # 2 peers by 2 lengths, 2 allocators, shares


@pytest.mark.slow
def test_experts(script):
    _, report = script("bench_moe", "--allocator", "default", "--only", "E 8")
    rows = {(row["name"], row["against"]): row for row in report["rows"]}
    assert {against for _, against in rows} == {"dense loop", "index_add loop", "MLP"} and len(rows) == 5
    for (_, against), row in rows.items():
        assert row["ratio"] > 0 and (row["difference"] is None if against == "MLP" else row["difference"] < 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(native.LIBRARY is None, reason=native.SAYS)
def test_decoding(script):
    printed, report = script("bench_decoding", "--only", "mamba")
    rows = {(row["name"], row["position"]): row for row in report["positions"]}
    assert rows["mamba", 5]["mambapy"] == "not installed: pip install mambapy" and rows["mamba", 40]["compiled"] > 0
    assert {row["name"] for row in report["generate"]} == {"mamba"} == {row["name"] for row in report["prefill"]}
    assert report["bound"][0]["tokens_per_second"] > 0 and "tokens/s of generate" in printed
    printed, report = script("bench_decoding", "--only", "serriform", "--against", "attention")
    assert [row["name"] for row in report["positions"]][::2] == ["serriform", "serriform with experts", "attention"]
    assert "compiled: serriform with experts is faster than attention " in printed
    assert "serriform: 29,293 parameters, attention: 29,280" in printed


@pytest.mark.slow
def test_loaders(script):
    printed, report = script("bench_loader", "--only", "stdlib")
    shuffled, streams = report["loaders"]
    assert (shuffled["order"], streams["order"]) == ("shuffled", "streams") and "stdlib" in printed
    for row in report["loaders"]:
        assert row["tokens_per_second"] > 0 and row["ratio"] == row["tokens_per_second"] / row["training"]


@pytest.mark.slow
def test_far_out(script):
    printed, report = script("bench_far", "--only", "laminar")
    near, far = report["far"]
    assert near["state_bytes"] == far["state_bytes"] > 0 and far["position"] > near["position"] and far["ratio"] == far["ms"] / near["ms"]
    assert "state, bytes" in printed


GGUF = """
class GGUFWriter:
    def __init__(self, file, architecture):
        self.file, self.lines = file, []
    def __getattr__(self, name):
        return lambda *values: self.lines.append(" ".join([name, *(str(getattr(value, "shape", value)) for value in values)]))
    def close(self):
        open(self.file, "w").write("\\n".join(self.lines))
"""


@pytest.mark.slow
@pytest.mark.skipif(native.LIBRARY is None, reason=native.SAYS)
def test_llama_cpp(script, tmp_path):
    program, seen = tmp_path / "llama-bench", tmp_path / "seen"
    answers = json.dumps([{"n_gen": 0, "avg_ts": 50.0}, {"n_gen": 16, "avg_ts": 4.0}])
    program.write_text(f"#!/bin/sh\necho \"$@\" > {seen}\ncat $2 >> {seen}\necho '{answers}'\n")
    program.chmod(0o755)
    (tmp_path / "gguf.py").write_text(GGUF)
    printed, report = script("bench_llama_cpp", str(program))
    decoding, prefill = report["rows"]
    assert decoding["llama_cpp"] == 4 and prefill["llama_cpp"] == 50 and "llama.cpp" in printed
    assert decoding["ratio"] == decoding["lab"] / 4 == decoding["lowest"] == decoding["highest"]
    told = seen.read_text()
    assert "-t 1 -p 8 -n 16 -r 1 -o json" in told
    assert "add_tensor blk.0.ssm_conv1d.weight (64, 4)" in told and "add_tensor blk.0.ssm_a (64, 16)" in told
