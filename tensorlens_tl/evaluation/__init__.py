"""Do scores name the tokens that a model needs: maskings, protocols, statistics.

Key concepts:
    evaluate: Scores tokens by several methods, masks them, runs the real model, measures.
    Protocol: Which sets of tokens are masked, and what number their outcomes make.
    Evaluation: One number per prompt, measure, masking and method, with paired comparisons.
"""

from .intervals import Estimate, bootstrap, median
from .runner import evaluate
from .significance import Comparison, compare, estimate, rank_correlation
from .study_file import read_study, study_text

__all__ = [
    "Comparison",
    "Estimate",
    "bootstrap",
    "compare",
    "estimate",
    "evaluate",
    "median",
    "rank_correlation",
    "read_study",
    "study_text",
]
