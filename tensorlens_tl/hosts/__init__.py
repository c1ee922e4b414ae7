"""All that knows TransformerLens: weights, hook points, tokens, wrapping and loading.

Key concepts:
    Adapter: Reads a host model; answers what its weights and hook points are, and runs it.
    wrap: Puts a TransformerBridge around a Hugging Face model, and compares the two.
    UnsupportedArchitectureError: Names the part of a model that cannot be frozen exactly.
"""

from .adapter import Adapter
from .attention_parts import QueryKeyWeights, query_key_weights, whole_norms
from .attention_reading import NotRecomputableError, RecomputedReading, StoredReading
from .encoders import each_prompt
from .entry import adapt, as_host, load_model, unwrap, wrap
from .experts import ExpertsRead
from .hook_points import Read, alone, in_this_thread
from .supported import UnsupportedArchitectureError
from .tokens import own_ids, prompts_of
from .wrapping import not_finite

__all__ = [
    "Adapter",
    "ExpertsRead",
    "NotRecomputableError",
    "QueryKeyWeights",
    "Read",
    "RecomputedReading",
    "StoredReading",
    "UnsupportedArchitectureError",
    "adapt",
    "alone",
    "as_host",
    "each_prompt",
    "in_this_thread",
    "load_model",
    "not_finite",
    "own_ids",
    "prompts_of",
    "query_key_weights",
    "unwrap",
    "whole_norms",
    "wrap",
]
