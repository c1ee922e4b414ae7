"""Whether one prompt's operator holds for others: relations decoded linearly, and local validity.

Key concepts:
    Relation: Prompt templates with subjects and objects, such as capitals of countries.
    decode: A study of how well linear maps from some prompts decode the objects of others.
    validity: A study of how far from its prompt the operator holds, beside the Jacobian.
"""

from .decoding_study import decode
from .relation import Relation
from .statements import state
from .validity_study import validity

__all__ = [
    "Relation",
    "decode",
    "state",
    "validity",
]
