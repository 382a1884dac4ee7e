"""From a run to exported files that were verified, and the manifest that says what they are.

    best.onnx            tokens -> logits
    best.prefill.onnx    tokens -> logits and the state
    best.step.onnx       a token and a state -> logits and the next state
    best.onnx.json       the manifest

Of an encoder-decoder best.encoder.onnx and best.decoder.onnx in place of the prefill (lab/export/graphs.py).

All is written and verified in a hidden folder beside the target. Only then the files are moved, the manifest last: it holds their
hashes, so that a reader can tell a whole export from one that was cut off between two moves.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import lab
from lab import ops
from lab.config import ConfigError
from lab.export.formats import FORMATS
from lab.export.graphs import Exported, graphs
from lab.export.verify import verify
from lab.files import sync_folder, write_json
from lab.models import SequenceModel
from lab.training.checkpoint import keep_random_states
from lab.training.load import check_config_file, find_checkpoint, load_checkpoint
from lab.training.provenance import now
from lab.training.run import Run


def export_run(
    target: str,
    format: str | None = None,
    output: str | None = None,
    checkpoint: str | None = None,
    trust: list[str] | None = None,
    config_file: str | None = None,
) -> tuple[dict[str, Any], Path]:
    """Exports a run or a checkpoint; returns the manifest and its file.

    format: onnx, torchscript or pt2; None: what the suffix of `output` says, or onnx. output: the file of the sequence graph, or a
    folder; the other files are named after it. None: exports/<checkpoint> in the run. checkpoint: best or last, of a run. config_file: a
    config that must not contradict the run's. Raises ConfigError, or RunError with the figure where a file differs from the model.
    """
    format = choose_format(format, output)
    FORMATS[format].check_packages(format)
    path = find_checkpoint(target, checkpoint)
    file = target_file(path, format, output)
    with ops.use(), keep_random_states():  # what the run forced was for its training: a reference implementation may be a loop
        loaded = load_checkpoint(path, trust or [])
    if config_file is not None:
        check_config_file(config_file, loaded.identity, "lab-export")
    identity, task = loaded.identity, loaded.task
    about = {
        "vocabulary": {"size": task.vocab_size, "task": identity["choices"]["task"], "encoding": task.encoding},
        "model": identity["choices"]["model"],
        "checkpoint": path.stem,
        "step": loaded.step,
        "config_hash": identity["config_hash"],
        "code_version": identity["code_version"],
        "config": identity["config"],
    }
    return export_model(loaded.model, format, file, task.vocab_size, loaded.model.max_len or 2 * task.seq_len, about)


def export_model(
    model: SequenceModel, format: str, file: Path, vocab_size: int, longest: int, about: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Path]:
    """Exports a model; returns the manifest and its file.

    vocab_size: of the input tokens. longest: the greatest length at which the files are compared with the model. about: entries of the
    manifest that say where the model comes from. The weights are written in float32, and the model is that afterwards, in eval mode.
    """
    model = model.float().cpu().eval()
    exported = graphs(model)
    manifest = file.with_name(f"{file.name}.json")
    fresh = [folder for folder in (file.parent, *file.parent.parents) if not folder.exists()]
    draft = file.parent / f".export.{os.getpid()}.tmp"
    try:
        draft.mkdir(parents=True)
        names = {graph.name: file_name(file.name, graph.name, format) for graph in exported.graphs}
        FORMATS[format].write(exported, {graph: draft / name for graph, name in names.items()})
        document = describe(exported, format, draft, names) | {"vocabulary": {"size": vocab_size}} | dict(about or {})
        write_json(draft / manifest.name, document)  # the verification goes by it
        document["limits"]["max_len_enforced"], document["verification"] = verify(model, draft / manifest.name, document, longest)
        write_json(draft / manifest.name, document)
        for name in (*names.values(), manifest.name):
            os.replace(draft / name, file.with_name(name))
        sync_folder(file.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        for folder in fresh:
            with suppress(OSError):  # something was written to it
                folder.rmdir()
    return document, manifest


def describe(exported: Exported, format: str, folder: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """What the manifest says about the files in `folder`, {graph: file name}."""
    graphs = [
        {
            "name": graph.name,
            "file": names[graph.name],
            "bytes": (folder / names[graph.name]).stat().st_size,
            "sha256": hashlib.sha256((folder / names[graph.name]).read_bytes()).hexdigest(),
            "inputs": [spec.document() for spec in graph.inputs],
            "outputs": [spec.document() for spec in graph.outputs],
        }
        for graph in exported.graphs
    ]
    with_source = any(graph.name == "encoder" for graph in exported.graphs)
    initial = exported.initial or (None,) * len(exported.state)
    packages = ("torch", *FORMATS[format].packages)
    return {
        "format": format,
        "opset": opset(folder / names["sequence"]) if format == "onnx" else None,
        "graphs": graphs,
        "state": [spec.document() | {"initial": value} for spec, value in zip(exported.state, initial, strict=True)],
        "limits": {"max_len": exported.max_len} | ({"max_source_len": exported.max_source_len} if with_source else {}),
        "versions": {"lab": lab.__version__, **{name: metadata.version(name) for name in packages}},
        "created": now(),
    }


def opset(file: Path) -> int:
    import onnx

    return next(entry.version for entry in onnx.load(file).opset_import if entry.domain in ("", "ai.onnx"))


def choose_format(format: str | None, output: str | None) -> str:
    """The format that --format or the name of the output says; ONNX where neither says one. ConfigError where they are at odds."""
    by_suffix = next((name for name, one in FORMATS.items() if output is not None and output.endswith(one.suffix)), None)
    if format is None:
        if output is None or is_folder(output):
            return "onnx"
        if by_suffix is None:
            endings = ", ".join(one.suffix for one in FORMATS.values())
            raise ConfigError(
                f"--output {output}: no format by this name: it should end in one of {endings}, or in / for a folder, or give --format"
            )
        return by_suffix
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: expected one of {', '.join(FORMATS)}")
    if by_suffix not in (None, format):
        raise ConfigError(f"--output {output} is the name of a file of format {by_suffix}, but --format is {format}")
    return format


def target_file(checkpoint: Path, format: str, output: str | None) -> Path:
    """The file of the sequence graph."""
    name = checkpoint.stem + FORMATS[format].suffix
    if output is not None:
        return Path(output) / name if is_folder(output) else Path(output)
    run = Run(checkpoint.parent.parent)
    return run.path / "exports" / name if checkpoint.parent == run.checkpoints and run.exists() else checkpoint.with_name(name)


def is_folder(output: str) -> bool:
    return output.endswith("/") or Path(output).is_dir()


def file_name(sequence: str, graph: str, format: str) -> str:
    """The file of a graph, by that of the sequence graph: best.ts.pt, best.prefill.ts.pt"""
    if graph == "sequence":
        return sequence
    suffix = FORMATS[format].suffix
    suffix = suffix if sequence.endswith(suffix) else Path(sequence).suffix
    return f"{sequence.removesuffix(suffix)}.{graph}{suffix}"
