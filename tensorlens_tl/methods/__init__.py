"""Every way to score tokens, the operator's own and earlier ones, by one call.

Key concepts:
    METHODS: Every method by name.
    TokenMatrix: How much of token j is in position i, for every prompt.
    TokenScores: How much of a target is due to every token.
"""

from .operator_matrices import OPERATOR_METHODS, plan_token_matrix
from .registry import METHODS, check_method, token_matrix, token_scores
from .residual_readings import LogitLens, logit_lens
from .routing import Routing
from .tables import TokenMatrix, TokenScores

__all__ = [
    "LogitLens",
    "METHODS",
    "OPERATOR_METHODS",
    "Routing",
    "TokenMatrix",
    "TokenScores",
    "check_method",
    "logit_lens",
    "plan_token_matrix",
    "token_matrix",
    "token_scores",
]
