"""Models: tokens -> logits, through the one interface of `SequenceModel`."""

from lab.models.base import SequenceModel, evaluating, initialise
from lab.models.beam_search import Beams, beam_search
from lab.models.block import Block
from lab.models.create import create_model
from lab.models.laminar import Laminar, LaminarNet, LaminarNetConfig
from lab.models.serriform import SerriformNet
from lab.models.stack import Stack
from lab.models.transformer import TransformerDecoderLayer, TransformerEncoderLayer, TransformerModel

__all__ = [
    "Beams", "Block", "Laminar", "LaminarNet", "LaminarNetConfig", "SequenceModel", "SerriformNet", "Stack", "TransformerDecoderLayer",
    "TransformerEncoderLayer", "TransformerModel", "beam_search", "create_model", "evaluating", "initialise",
]  # fmt: skip
