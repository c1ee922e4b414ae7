"""Change a run through its operator: predicted in closed form, checked in the real model.

Key concepts:
    Place: Where a run is edited: a residual site, or what W_O, W_out or a pattern reads.
    Edit: A change of the activations of some prompts, with the change of a target that it predicts.
    EditCheck: What an edit predicted, and what the real model did.
"""

from .asking import Asked, edit_along, edit_to_top, smallest_edit
from .edit import Edit
from .edit_check import EditCheck, EditSweep
from .edit_file import load_edit, save_edit
from .goals import Goal
from .patching_study import Predictions, predict
from .ranking import EditRanking, rank_edits
from .real_runs import faithfulness_of_features
from .study import EditEvaluation, evaluate
from .weight_edit import to_weights

__all__ = [
    "Asked",
    "Edit",
    "EditCheck",
    "EditEvaluation",
    "EditRanking",
    "EditSweep",
    "Goal",
    "Predictions",
    "edit_along",
    "edit_to_top",
    "evaluate",
    "faithfulness_of_features",
    "load_edit",
    "predict",
    "rank_edits",
    "save_edit",
    "smallest_edit",
    "to_weights",
]
