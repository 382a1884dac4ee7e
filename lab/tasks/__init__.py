"""Tasks: data, splits, loss mask and metrics. A model knows none of that; a task knows nothing of models."""

from lab.tasks.base import Batch, Split, Task
from lab.tasks.copy_reverse import CopyReverse
from lab.tasks.corpus import ByteCorpus
from lab.tasks.dataset import Dataset
from lab.tasks.loader import EvalLoader, TrainLoader
from lab.tasks.stdlib import StandardLibrary

__all__ = ["Batch", "ByteCorpus", "CopyReverse", "Dataset", "EvalLoader", "Split", "StandardLibrary", "Task", "TrainLoader"]
