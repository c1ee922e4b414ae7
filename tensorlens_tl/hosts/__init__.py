"""All that knows TransformerLens: weights, hook points, tokens, the recorded run, the live model.

Key concepts:
    Adapter: Reads a host model; answers what its weights and hook points are, and runs it.
    freeze: One forward pass, recorded, frozen and checked, as a Capture.
    LiveModel: The real model on the prompts of a capture, run with hooks of the library.
"""

from .adapter import Adapter, Read
from .entry import adapt, hosted, wrap
from .live_model import Edit, LiveModel, Scores, hooked, live_models, target_of
from .loading import load_model
from .run import freeze, record
from .score_weights import Layout, query_key_weights, score_weights
from .supported import UnsupportedArchitectureError
from .tokens import each_prompt, is_text, mask_spans

__all__ = [
    "Adapter",
    "Edit",
    "Layout",
    "LiveModel",
    "Read",
    "Scores",
    "UnsupportedArchitectureError",
    "adapt",
    "each_prompt",
    "freeze",
    "hooked",
    "hosted",
    "is_text",
    "live_models",
    "load_model",
    "mask_spans",
    "query_key_weights",
    "record",
    "score_weights",
    "target_of",
    "wrap",
]
