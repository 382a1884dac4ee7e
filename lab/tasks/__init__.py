"""Tasks: data, splits, loss mask and metrics. A model knows none of that; a task knows nothing of models."""

from lab.tasks.base import Batch, Split, Task
from lab.tasks.compression import Compression
from lab.tasks.copy_reverse import CopyReverse
from lab.tasks.corpus import ByteCorpus
from lab.tasks.dataset import Dataset
from lab.tasks.digits import Digits
from lab.tasks.fuzzy_recall import FuzzyRecall
from lab.tasks.induction_heads import InductionHeads
from lab.tasks.listops import ListOps
from lab.tasks.loader import EvalLoader, TrainLoader
from lab.tasks.memorization import Memorization
from lab.tasks.mqar import MQAR
from lab.tasks.parity import Parity
from lab.tasks.recall import InContextRecall
from lab.tasks.selective_copy import SelectiveCopy
from lab.tasks.sorting import Sorting
from lab.tasks.stdlib import StandardLibrary
from lab.tasks.synthetic import Synthetic

__all__ = [
    "MQAR", "Batch", "ByteCorpus", "Compression", "CopyReverse", "Dataset", "Digits", "EvalLoader", "FuzzyRecall", "InContextRecall",
    "InductionHeads", "ListOps", "Memorization", "Parity", "SelectiveCopy", "Sorting", "Split", "StandardLibrary", "Synthetic", "Task",
    "TrainLoader",
]  # fmt: skip
