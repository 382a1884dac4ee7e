"""How a graph is written. ONNX and torch.export record it with free axes; TorchScript traces it, and its shapes stay those of the inputs.

A writer gets the graphs of a model and the file of each. What cannot be recorded is a RunError; whether it is right, verify.py says.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from lab.config import ConfigError
from lab.export.graphs import BATCH, CACHE, LENGTH, SOURCE, Exported, Graph
from lab.training.run import RunError


@dataclass(frozen=True)
class Format:
    suffix: str
    write: Callable[[Exported, Mapping[str, Path]], None]  # the graphs, and the file of each by its name
    packages: tuple[str, ...] = ()  # beyond what lab itself needs

    def check_packages(self, name: str) -> None:
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            raise ConfigError(f"--format {name} needs {', '.join(missing)}, not installed here: pip install onnx onnxscript onnxruntime")


@contextmanager
def in_one_sentence(graph: Graph) -> Iterator[None]:
    """Whatever the exporters raise is one sentence; their warnings, which are about their own insides, are not shown."""
    torch_onnx = logging.getLogger("torch.onnx")
    level = torch_onnx.level
    torch_onnx.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # torch raises dozens of kinds, some of them private
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter to ONNX wraps what it met into pages of advice
            cause = cause.__cause__
        reason = " ".join(line.strip() for line in str(cause).splitlines() if line.strip()) or type(cause).__name__
        reason = reason.replace('For more information, run with TORCH_LOGS="+dynamic". - ', "")[:200]
        raise RunError(f"the {graph.name} graph cannot be recorded: {reason}") from error
    finally:
        torch_onnx.setLevel(level)


def free_axes(graph: Graph, exported: Exported) -> tuple[Any, ...]:
    """The dynamic_shapes of torch.export. The cache may be empty; it has no room for more than max_len - 1 tokens before a step."""
    max_len = exported.max_len
    dims = {
        BATCH: Dim(BATCH, min=1),
        LENGTH: Dim(LENGTH, min=1, max=max_len),
        CACHE: Dim(CACHE, min=0, max=None if max_len is None else max_len - 1),
        SOURCE: Dim(SOURCE, min=1, max=exported.max_source_len),
    }
    axes = [{axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)} for spec in graph.inputs]
    return (axes[0], tuple(axes[1:])) if graph.name in ("step", "decoder") else tuple(axes)  # these take their state as *state


def write_pt2(exported: Exported, files: Mapping[str, Path]) -> None:
    for graph in exported.graphs:
        with in_one_sentence(graph):
            torch.export.save(
                torch.export.export(graph.module, graph.example, dynamic_shapes=free_axes(graph, exported)), files[graph.name]
            )


def write_torchscript(exported: Exported, files: Mapping[str, Path]) -> None:
    for graph in exported.graphs:
        with in_one_sentence(graph):  # check_trace would run at the example's sizes alone
            torch.jit.trace(graph.module, graph.example, check_trace=False).save(str(files[graph.name]))


def forget_shapes(graph: Any) -> None:
    """Removes the recorded shapes of inner values: those of a Fourier transform are wrong where the length is free."""
    kept = set(graph.outputs)
    for node in graph:
        for value in node.outputs:
            if value not in kept:
                value.shape = None


def write_onnx(exported: Exported, files: Mapping[str, Path]) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graphs = {graph.name: graph for graph in exported.graphs}
    if "prefill" in graphs:
        del graphs["sequence"]  # the prefill graph without the state; recording takes seconds
    for name, graph in graphs.items():
        with in_one_sentence(graph):
            program = torch.onnx.export(
                graph.module,
                graph.example,
                dynamo=True,
                dynamic_shapes=free_axes(graph, exported),
                input_names=[spec.name for spec in graph.inputs],
                output_names=[spec.name for spec in graph.outputs],
                verbose=False,
            )
            assert program is not None
            forget_shapes(program.model.graph)
            program.save(files[name], external_data=False)
            if name == "prefill":
                del program.model.graph.outputs[1:]
                RemoveUnusedNodesPass()(program.model)
                program.save(files["sequence"], external_data=False)


FORMATS = {
    "onnx": Format(".onnx", write_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torchscript": Format(".ts.pt", write_torchscript),
    "pt2": Format(".pt2", write_pt2),
}
