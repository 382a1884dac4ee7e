"""Tasks: data, splits, loss mask and metrics. A model knows none of that; a task knows nothing of models."""

from lab.tasks.base import Batch, Split, Task
from lab.tasks.copy_reverse import CopyReverse
from lab.tasks.corpus import Corpus
from lab.tasks.dataset import Dataset
from lab.tasks.enwik8 import Enwik8
from lab.tasks.loader import EvalLoader, TrainLoader
from lab.tasks.stdlib import StandardLibrary
from lab.tasks.text import Text

__all__ = [
    "Batch", "CopyReverse", "Corpus", "Dataset", "Enwik8", "EvalLoader", "Split", "StandardLibrary", "Task", "Text", "TrainLoader",
]  # fmt: skip
