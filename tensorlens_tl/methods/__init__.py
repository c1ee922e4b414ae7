"""Every way to score tokens, the operator's own and earlier ones, by one call.

Key concepts:
    METHODS: Every method by name.
    TokenMatrix: How much of token j is in position i, for every prompt.
    TokenScores: How much of a target is due to every token.
"""

from .operator_matrices import OPERATOR_METHODS, plan_token_matrix
from .registry import METHODS, check_method, token_matrix, token_scores
from .tables import TokenMatrix, TokenScores

__all__ = [
    "METHODS",
    "OPERATOR_METHODS",
    "TokenMatrix",
    "TokenScores",
    "check_method",
    "plan_token_matrix",
    "token_matrix",
    "token_scores",
]
