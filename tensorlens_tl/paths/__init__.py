"""The largest paths from a token to a target, through heads and MLPs.

Key concepts:
    find_paths: The search.
    Paths: What it finds, and what is known of all other paths.
"""

from .results import Paths
from .search import find_paths

__all__ = ["Paths", "find_paths"]
