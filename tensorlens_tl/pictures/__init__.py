"""Pictures of results: figures for a paper, pages for a browser.

Key concepts:
    Drawer: A function that draws plain numbers, labels and nodes. What they mean stays above.
    Page: One HTML file that shows a result, needs nothing beside it, and asks for nothing.
    View: One drawing of a page: a kind, and plain data. Its drawer is assets/kind.js.

No torch in this room, and matplotlib only where a figure is drawn.
"""

from .charts import curves, dots, estimates, token_figure
from .figures import agreement, bars, cell_map, waterfall
from .graphs import path_rows, placed_graph
from .maps import depth, map_view, panel
from .node_graph import edge_view, flow_view, graph_view
from .page import Page, Paged, View
from .split_pages import PagedPatches, grid_view, patch_view, split_page
from .splits import Split, graph_figure, head_cells, patch_figure, split_figure, unit_of
from .tabled import Tabled
from .tables import (
    curves_view,
    interval_text,
    interval_view,
    intervals_over,
    points_view,
    table_view,
    waterfall_view,
    words_view,
)

__all__ = [
    "Page",
    "Paged",
    "PagedPatches",
    "Split",
    "Tabled",
    "View",
    "agreement",
    "bars",
    "cell_map",
    "curves",
    "curves_view",
    "depth",
    "dots",
    "edge_view",
    "estimates",
    "flow_view",
    "graph_figure",
    "graph_view",
    "grid_view",
    "head_cells",
    "interval_text",
    "interval_view",
    "intervals_over",
    "map_view",
    "panel",
    "patch_figure",
    "patch_view",
    "path_rows",
    "placed_graph",
    "points_view",
    "split_figure",
    "split_page",
    "table_view",
    "token_figure",
    "unit_of",
    "waterfall",
    "waterfall_view",
    "words_view",
]
