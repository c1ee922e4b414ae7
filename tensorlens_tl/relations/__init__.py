from .decoding_study import decode as decode
from .relation import Relation as Relation
from .statements import state as state
from .validity_study import validity as validity
