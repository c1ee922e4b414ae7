"""Training signals from the operator: a student learns how its teacher's tokens act on tokens.

Key concepts:
    OperatorLoss: The distance between the operators of two models on the same prompts.
    rows_of: Rows of the operator, from every token to one logit, for losses of one's own.
"""

from .operator_loss import OperatorLoss, rows_of

__all__ = ["OperatorLoss", "rows_of"]
