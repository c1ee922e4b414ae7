"""Pictures of results: figures for a paper, pages for a browser.

Key concepts:
    Drawer: A function that draws plain numbers, labels and nodes. What they mean stays above.
    Page: One HTML file that shows a result, needs nothing beside it, and asks for nothing.
    View: One drawing of a page: a kind, and plain data. Its drawer is assets/kind.js.

No torch in this room.
"""

from .maps import depth, map_view, panel
from .page import Page, Paged

__all__ = ["Page", "Paged", "depth", "map_view", "panel"]
