"""One run of the real model, recorded, frozen and checked; and the model run again with hooks.

Key concepts:
    freeze: One forward pass, recorded, frozen and checked, as a Capture.
    LiveModel: The real model on the prompts of a capture, run with hooks of the library.
"""

from .live_model import Edit, LiveModel, Scores, hooked, live_models, target_of, unsplit
from .run import freeze, record

__all__ = [
    "Edit",
    "LiveModel",
    "Scores",
    "freeze",
    "hooked",
    "live_models",
    "record",
    "target_of",
    "unsplit",
]
