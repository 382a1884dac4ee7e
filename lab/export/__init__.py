"""Export: a trained model as files that other programs load, each checked against the model before it is left in place.

graphs.py     what is exported of a model: up to three functions of plain tensors, with the names and shapes of those
formats.py    how a graph is written: ONNX, TorchScript, torch.export
verify.py     the files, loaded again in a process that has no lab, give the model's logits
isolated.py   what that process runs
export.py     from a run to verified files and their manifest
"""

from lab.export.export import export_model, export_run
from lab.export.formats import FORMATS

__all__ = ["FORMATS", "export_model", "export_run"]
