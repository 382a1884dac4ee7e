"""Tasks: data, splits, loss mask and metrics. A model knows none of that; a task knows nothing of models."""

from lab.tasks.base import Batch, Split, Task
from lab.tasks.copy_reverse import CopyReverse
from lab.tasks.dataset import Dataset
from lab.tasks.loader import EvalLoader, TrainLoader

__all__ = ["Batch", "CopyReverse", "Dataset", "EvalLoader", "Split", "Task", "TrainLoader"]
