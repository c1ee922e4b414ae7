"""What a user holds, and its file.

Key concepts:
    FrozenRun: A captured run with its operator, and how exact that is.
    TensorLens: A frozen run, and every question to it as one method.
    load: Reads a lens from a file. Nothing in the file is executed.
"""

from .frozen_run import FrozenRun
from .tensor_lens import TensorLens, load

__all__ = [
    "FrozenRun",
    "TensorLens",
    "load",
]
