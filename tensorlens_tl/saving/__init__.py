"""A captured run in a file: safetensors and JSON, of which nothing is executed.

Key concepts:
    save_capture: Writes a captured run, whole or not at all.
    load_capture: Reads one, and refuses files that are damaged or of another model.
    require_weights: Refuses a question that needs weights which a file does not hold.
"""

from .missing_weights import require_weights
from .saved_file import load_capture, save_capture

__all__ = ["load_capture", "require_weights", "save_capture"]
