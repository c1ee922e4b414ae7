"""All that knows TransformerLens: weights, hook points, tokens, the recorded run, the live model.

Key concepts:
    Adapter: Reads a host model; answers what its weights and hook points are, and runs it.
    freeze: One forward pass, recorded, frozen and checked, as a Capture.
    LiveModel: The real model on the prompts of a capture, run with hooks of the library.
"""

from .adapter import Adapter, QueryKeyWeights
from .entry import adapt, as_host, load_model, unwrap, wrap
from .hook_points import Read, alone, in_this_thread
from .live_model import Edit, LiveModel, Scores, hooked, live_models, target_of, unsplit
from .run import freeze, record
from .supported import UnsupportedArchitectureError
from .tokens import each_prompt, own_ids, prompts_of

__all__ = [
    "Adapter",
    "Edit",
    "LiveModel",
    "QueryKeyWeights",
    "Read",
    "Scores",
    "UnsupportedArchitectureError",
    "adapt",
    "alone",
    "as_host",
    "each_prompt",
    "freeze",
    "hooked",
    "in_this_thread",
    "live_models",
    "load_model",
    "own_ids",
    "prompts_of",
    "record",
    "target_of",
    "unsplit",
    "unwrap",
    "wrap",
]
