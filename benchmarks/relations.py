"""Relations decoded linearly, and how far from its prompt the operator holds: two studies, one file.

``python benchmarks/relations.py [--quick] [--splits 16] [--json PATH] [--page PATH]``

1. The bundled model's four relations of countries: the frozen operator's maps beside the Jacobian's.
   Bar: the operator's faithfulness at β = 1 is at least the Jacobian's at its tuned β, within the
   paired interval, for each relation and over all.
2. Local validity of the operator and of the Jacobian's first order, on the bundled model and on
   stories260K: along random, token-swap and steering directions.

The JSON holds all; ``docs/relations.md`` is made of it and nothing else.
"""

from __future__ import annotations
