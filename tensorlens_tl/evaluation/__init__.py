"""Do scores name the tokens that a model needs: maskings, protocols, statistics.

Key concepts:
    evaluate: Score tokens by several methods, mask them, run the real model, measure.
    Protocol: Which sets of tokens are masked, and what number their outcomes make.
    Evaluation: A number per prompt, measure, masking and method, with paired comparisons.
"""

from .intervals import Estimate, bootstrap, median
from .runner import evaluate

__all__ = [
    "Estimate",
    "bootstrap",
    "evaluate",
    "median",
]
