"""Work over many prompts in chunks: kept in a folder, resumed, and spread over processes.

Key concepts:
    spread: Runs the chunks that are missing, by all processes, and gives all in order.
    question_of: Tells one question from another.
"""

from .processes import spread
from .question import model_mark, plain, question_of

__all__ = ["model_mark", "plain", "question_of", "spread"]
