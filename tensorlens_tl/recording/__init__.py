"""One run of the real model, recorded, frozen and checked; and the model run again with hooks.

Key concepts:
    freeze: One forward pass, recorded, frozen and checked, as a Capture.
    LiveModel: The real model on the prompts of a capture, run with hooks of the library.
"""

from .live_model import (
    HookEdit,
    LiveModel,
    Scores,
    hooked,
    input_replaced,
    live_models,
    output_replaced,
    target_of,
    unsplit,
)
from .run import freeze, record

__all__ = [
    "HookEdit",
    "LiveModel",
    "Scores",
    "freeze",
    "hooked",
    "input_replaced",
    "live_models",
    "output_replaced",
    "record",
    "target_of",
    "unsplit",
]
