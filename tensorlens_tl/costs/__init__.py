"""What a computation costs: floating-point operations, time and peak memory, before it runs.

Key concepts:
    Plan: The predicted cost of one call.
    Rehearsal: Counts what a call will do while nothing is computed.
    memory_budget: The most memory that a call may take.
"""

from .cost_model import (
    CAUSAL_TILE,
    HEAP,
    KEPT,
    ROWS,
    BranchShape,
    StageShape,
    SweepShape,
    carried_by,
    fold_group,
    folds_below,
    free_memory,
    half_bytes,
    make_plan,
    memory_budget,
    rates_of,
)
from .cost_plan import Plan
from .machine_rates import Cost
from .rehearsal import Rehearsal, forgets, rehearsed

__all__ = [
    "BranchShape",
    "CAUSAL_TILE",
    "Cost",
    "HEAP",
    "KEPT",
    "Plan",
    "ROWS",
    "Rehearsal",
    "StageShape",
    "SweepShape",
    "carried_by",
    "fold_group",
    "folds_below",
    "forgets",
    "free_memory",
    "half_bytes",
    "make_plan",
    "memory_budget",
    "rates_of",
    "rehearsed",
]
