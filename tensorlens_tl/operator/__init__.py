"""Compose one run into the operator T, apply it, take it apart, and tell what that costs.

Key concepts:
    Capture: What one run left (frozen sublayers, residual states, logits), without the model.
    FrozenTransformer: The operator T and its bias, from X to the final normalized residual y.
    SecantOperator: The operator between two runs, exact on their difference.
"""

from .batched_sweep import BatchedSweep, Reduction, dots, squares
from .blocks import PLANNED
from .capture import Capture, CaptureMismatchError, Convention, FrozenBlock, tolerance
from .frozen_transformer import FrozenTransformer, Segment
from .prompts import EMPTY, ClassNames, Prompts, check_tokens, patch_names, token_id
from .query_key import QueryKey, turned
from .residual_stream import Branch, Readers, Step, Trace
from .restricted_transformer import RestrictedTransformer
from .secant import SecantOperator

__all__ = [
    "BatchedSweep",
    "Branch",
    "Capture",
    "CaptureMismatchError",
    "ClassNames",
    "Convention",
    "EMPTY",
    "FrozenBlock",
    "FrozenTransformer",
    "PLANNED",
    "Prompts",
    "QueryKey",
    "Readers",
    "Reduction",
    "RestrictedTransformer",
    "SecantOperator",
    "Segment",
    "Step",
    "Trace",
    "check_tokens",
    "dots",
    "patch_names",
    "squares",
    "token_id",
    "tolerance",
    "turned",
]
