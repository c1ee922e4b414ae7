"""Pictures of results: figures for a paper, pages for a browser.

Key concepts:
    Drawer: A function that draws plain numbers, labels and nodes. What they mean stays above.

No torch in this room.
"""

__all__ = []
