"""The command line: explain predictions, test methods, find circuits and test them.

Key concepts:
    main: Runs one command, and gives its exit status.
    Output: What a command found, as text, JSON, HTML or a Graphviz graph.
"""

from .commands import main

__all__ = ["main"]
