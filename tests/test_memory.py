"""trainer.reuse_memory: freed memory stays with the process while a run trains, and the run says so."""

from __future__ import annotations

import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from lab import memory
from lab.config import ConfigError

glibc = pytest.mark.skipif(memory.why_not_reuse() is not None, reason=str(memory.why_not_reuse()))


def page_faults(megabytes: int = 34) -> int:
    """Of 20 products of so many MB. glibc by itself maps each of 34 MB afresh, a fault for each of its 8,704 pages; smaller ones it learns
    to keep."""
    x, before = torch.ones(megabytes * 2**18), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.mul(x, 2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def measured() -> dict[str, tuple[str, int, float]]:
    """The allocator's name, page faults, and the MB that stay with the process: before the block, in it, afterwards."""

    def look(megabytes: int = 34) -> tuple[str, int, float]:
        faults = page_faults(megabytes) if megabytes else 0
        return memory.allocator(), faults, int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    found = {"before": look()}
    with memory.reusing_memory():
        found["in it"] = look()
    found["afterwards"] = look(0)
    return found | {"small ones": look(4)}


@glibc
def test_freed_memory_is_used_again_in_the_block_alone():
    # In a process of its own: a hole that other tests left in the heap would serve 34 MB at any time.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        found = process.submit(measured).result()
    names, faults, kept = ({when: values[index] for when, values in found.items()} for index in range(3))
    assert names["before"] == names["afterwards"] == memory.allocator() and names["in it"] == f"{memory.allocator()}, memory reused"
    # Of the 20 a few may be served afresh: a hole in the heap is at times a few bytes too small for an aligned tensor.
    assert faults["before"] > 20 * 8000 and faults["in it"] < 5 * 8704, "the heap grows to what is needed, and no further"
    assert kept["in it"] > kept["before"] + 60 > kept["afterwards"] + 30, "what was kept is given back"
    assert faults["small ones"] < 5 * 1024, "what glibc keeps by itself it keeps afterwards, too"


@glibc
def test_a_run_names_its_allocator_and_stays_the_same_experiment(tiny):
    plain, reused = tiny(run_dir="plain"), tiny("trainer.reuse_memory=true", run_dir="reused")
    assert (
        reused.metrics["env"]["allocator"]
        == plain.metrics["env"]["allocator"] + ", memory reused"
        == memory.allocator() + ", memory reused"
    )
    assert reused.metrics["config_hash"] == plain.metrics["config_hash"] and reused.metrics["metrics"] == plain.metrics["metrics"]


@pytest.mark.parametrize("elsewhere", ["macOS", "jemalloc"])
def test_with_another_allocator_it_is_a_mistake_not_a_silence(tiny, tmp_path, monkeypatch, elsewhere):
    if elsewhere == "macOS":
        monkeypatch.setattr(memory, "_glibc", lambda: None)
        monkeypatch.setattr(memory.platform, "system", lambda: "Darwin")
    else:
        monkeypatch.setattr(memory, "replaced", lambda: "jemalloc")
    named = {"macOS": "that of Darwin", "jemalloc": "jemalloc"}[elsewhere]
    sentence = (
        rf"^trainer.reuse_memory \(command line\): it is a setting of glibc's allocator, and the one here is {named}; leave it false$"
    )
    with pytest.raises(ConfigError, match=sentence):
        tiny("trainer.reuse_memory=true")
    assert not (tmp_path / "run" / "config.yaml").exists()
    with pytest.raises(RuntimeError, match="reuse_memory: it is a setting of glibc's"), memory.reusing_memory():
        pass


def test_variables_that_change_the_allocator_are_named(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    assert memory.allocator().endswith(", MALLOC_MMAP_MAX_=0")
