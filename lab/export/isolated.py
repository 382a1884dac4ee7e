"""Runs exported files by what their manifest says, in a Python without lab: python -I isolated.py MANIFEST CASES RESULTS FOLDER...

CASES (npz): `sequence...`, `prefill...`, `decoder...` tokens (B, L) for the graph of that name; `stream.K...` tokens (B, L) of which the
first K go through prefill or decoder and the others through the step; `refuse.GRAPH` too many tokens, which the graph should refuse (all
but the last are a step's prefill); `source-of CASE` the source (B, S) of a case, of an encoder-decoder. RESULTS (npz): under the same name
the logits (B, L, V), a text that says what was raised, or for `refuse` whether it was.
FOLDERs are where modules are looked for after Python's own places.
"""

import json
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path.extend(folder for folder in sys.argv[4:] if folder not in sys.path)

import numpy as np

SOURCE_OF = "source-of "


class Blocker:
    """An editable install makes lab importable everywhere; a file that needs it is not an export."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lab":
            raise ImportError("lab is not there")


def load(document, folder):
    """{graph: function from a list of arrays to a list of arrays}"""
    if document["format"] == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it refuses is raised
        options.intra_op_num_threads = 1

        def onnx(graph):
            session = onnxruntime.InferenceSession(folder / graph["file"], options, providers=["CPUExecutionProvider"])
            names = [spec["name"] for spec in graph["inputs"]]
            outputs = [spec["name"] for spec in graph["outputs"]]
            return lambda arrays: session.run(outputs, dict(zip(names, arrays, strict=True)))

        return {graph["name"]: onnx(graph) for graph in document["graphs"]}

    import torch

    torch.set_num_threads(1)

    def function(graph):
        file = folder / graph["file"]
        module = torch.jit.load(str(file)) if document["format"] == "torchscript" else torch.export.load(file).module()

        def call(arrays):
            with torch.no_grad():
                out = module(*(torch.from_numpy(np.array(array)) for array in arrays))
            return [tensor.numpy() for tensor in (out if isinstance(out, tuple | list) else [out])]

        return call

    return {graph["name"]: function(graph) for graph in document["graphs"]}


def initial(document, batch):
    """The state before the first token."""
    sizes = {"batch": batch, "cache": 0}
    return [
        np.broadcast_to(np.asarray(spec["initial"], spec["dtype"]), [sizes.get(axis, axis) for axis in spec["shape"]])
        for spec in document["state"]
    ]


def stream(document, graphs, tokens, k, source):
    parts, state = [], None
    if source is not None:
        state = graphs["encoder"]([source])
        if k:
            logits, *state = graphs["decoder"]([tokens[:, :k], *state])
            parts.append(logits)
    elif k:
        logits, *state = graphs["prefill"]([tokens[:, :k]])
        parts.append(logits)
    else:
        state = initial(document, len(tokens))
    for t in range(k, tokens.shape[1]):
        logits, *state = graphs["step"]([tokens[:, t], *state])
        parts.append(logits[:, None])
    return np.concatenate(parts, 1)


def at_once(graphs, name, tokens, source):
    if source is None:
        return graphs[name]([tokens])[0]
    return graphs[name]([tokens, *graphs["encoder"]([source])] if name == "decoder" else [source, tokens])[0]


def answer(document, graphs, case, tokens, source=None):
    kind, which, *_ = case.split(".")
    if kind == "refuse":
        try:
            if which == "step":
                stream(document, graphs, tokens, tokens.shape[1] - 1, source)
            else:
                at_once(graphs, which, tokens, source)
        except Exception:
            return np.asarray(True)
        return np.asarray(False)
    try:
        return stream(document, graphs, tokens, int(which), source) if kind == "stream" else at_once(graphs, kind, tokens, source)
    except Exception as error:
        return np.asarray(sentence(error))


def sentence(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[-1 if 'TorchScript interpreter' in lines[0] else 0]}"[:500]


def main(manifest, cases, results):
    sys.meta_path.insert(0, Blocker())
    warnings.simplefilter("ignore")
    document = json.loads(Path(manifest).read_text())
    try:
        graphs = load(document, Path(manifest).parent)
    except Exception as error:
        sys.exit(sentence(error))
    with np.load(cases) as inputs:
        cases = {name: inputs[name] for name in inputs.files}
    sources = {name.removeprefix(SOURCE_OF): cases.pop(name) for name in list(cases) if name.startswith(SOURCE_OF)}
    np.savez(results, **{case: answer(document, graphs, case, tokens, sources.get(case)) for case, tokens in cases.items()})
    assert "lab" not in sys.modules


if __name__ == "__main__":
    main(*sys.argv[1:4])
