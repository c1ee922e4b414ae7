"""Does the operator of one prompt hold for others: linear relations, and the radius of validity.

Key concepts:
    Relation: Prompt templates with subjects and objects, such as capitals of countries.
    decode: A study of how well a map from one prompt decodes the objects of others.
    validity: Errors of the operator and the Jacobian at a distance from their prompt.
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
