"""All that knows TransformerLens: weights, tokens, wrapping, loading and running.

Key concepts:
    Adapter: Reads a host model; answers what its weights and hook points are, and runs it.
    wrap: Puts a TransformerBridge around a Hugging Face model, and compares the two.
    load_model: Loads a host model by a hub name, or from a local folder.
"""

from .adapter import Adapter
from .entry import adapt, as_host, choose_bos, unwrap, wrap
from .loading import load_model
from .pictures import added_token, each_prompt
from .tokens import own_ids, prompts_of

__all__ = [
    "Adapter",
    "adapt",
    "added_token",
    "as_host",
    "choose_bos",
    "each_prompt",
    "load_model",
    "own_ids",
    "prompts_of",
    "unwrap",
    "wrap",
]
