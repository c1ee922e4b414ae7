"""What a user holds: a captured run that answers every question.

Key concepts:
    FrozenRun: A captured run with its operator, and how exact that is.
    TensorLens: A frozen run, and every question to it as one method.
    WriteCheck: Whether the weights or the returned logits were written to.
"""

from .frozen_run import FrozenRun
from .planning import plan
from .sequence_attribution import SequenceAttribution
from .tensor_lens import TensorLens, load
from .write_check import WriteCheck

__all__ = [
    "FrozenRun",
    "SequenceAttribution",
    "TensorLens",
    "WriteCheck",
    "load",
    "plan",
]
