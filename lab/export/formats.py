"""How a graph is written. ONNX and torch.export record it with free axes; TorchScript traces it, and its shapes stay those of the inputs.

A writer gets a graph and the file to write. What cannot be recorded is a RunError; whether what was recorded is right, verify.py says.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from lab.config import ConfigError
from lab.export.graphs import BATCH, CACHE, LENGTH, Graph
from lab.training.run import RunError


@dataclass(frozen=True)
class Format:
    suffix: str
    write: Callable[[Graph, Path, int | None], None]  # graph, file, max_len
    packages: tuple[str, ...] = ()  # beyond what lab itself needs

    def check_packages(self, name: str) -> None:
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            raise ConfigError(f"--format {name} needs {', '.join(missing)}, not installed here: pip install 'lab[export]'")


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
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RunError(f"the {graph.name} graph cannot be recorded: {reason}") from error
    finally:
        torch_onnx.setLevel(level)


def free_axes(graph: Graph, max_len: int | None) -> tuple[Any, ...]:
    """The dynamic_shapes of torch.export. The cache may be empty; it has no room for more than max_len - 1 tokens before a step."""
    dims = {
        BATCH: Dim(BATCH, min=1),
        LENGTH: Dim(LENGTH, min=1, max=max_len),
        CACHE: Dim(CACHE, min=0, max=None if max_len is None else max_len - 1),
    }
    axes = [{axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)} for spec in graph.inputs]
    return (axes[0],) if graph.name != "step" else (axes[0], tuple(axes[1:]))  # the step takes its state as *state


def program(graph: Graph, max_len: int | None) -> ExportedProgram:
    return torch.export.export(graph.module, graph.example, dynamic_shapes=free_axes(graph, max_len))


def write_pt2(graph: Graph, file: Path, max_len: int | None) -> None:
    with in_one_sentence(graph):
        torch.export.save(program(graph, max_len), file)


def write_torchscript(graph: Graph, file: Path, max_len: int | None) -> None:
    with in_one_sentence(graph):  # check_trace would run at the example's sizes alone
        torch.jit.trace(graph.module, graph.example, check_trace=False).save(str(file))


def write_onnx(graph: Graph, file: Path, max_len: int | None) -> None:
    with in_one_sentence(graph):
        onnx_program = torch.onnx.export(
            graph.module,
            graph.example,
            dynamo=True,
            dynamic_shapes=free_axes(graph, max_len),
            input_names=[spec.name for spec in graph.inputs],
            output_names=[spec.name for spec in graph.outputs],
            verbose=False,
        )
        onnx_program.save(file, external_data=False)


FORMATS = {
    "onnx": Format(".onnx", write_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torchscript": Format(".ts.pt", write_torchscript),
    "pt2": Format(".pt2", write_pt2),
}
