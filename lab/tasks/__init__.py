"""Tasks: data, splits, loss mask and metrics. A model knows none of that; a task knows nothing of models."""

from lab.tasks.base import Batch, Split, Task
from lab.tasks.copy_reverse import CopyReverse
from lab.tasks.corpus import ByteCorpus
from lab.tasks.dataset import Dataset
from lab.tasks.induction_heads import InductionHeads
from lab.tasks.loader import EvalLoader, TrainLoader
from lab.tasks.mqar import MQAR
from lab.tasks.recall import InContextRecall
from lab.tasks.selective_copy import SelectiveCopy
from lab.tasks.stdlib import StandardLibrary
from lab.tasks.synthetic import Synthetic

__all__ = [
    "MQAR", "Batch", "ByteCorpus", "CopyReverse", "Dataset", "EvalLoader", "InContextRecall", "InductionHeads", "SelectiveCopy", "Split",
    "StandardLibrary", "Synthetic", "Task", "TrainLoader",
]  # fmt: skip
