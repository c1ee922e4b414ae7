"""Results put together for one picture: what is best understood by looking.

Key concepts:
    OperatorMaps: The operator's map of one prompt from every depth, beside an earlier method's.
    Waterfall: One logit as the sum of what every sublayer adds, beside the logit lens.
    RunReport: The main pictures of one prompt on one page.
"""

from .comparisons import PromptComparison, compare_prompts
from .head_maps import HeadMaps, maps_of_heads
from .operator_maps import OperatorMaps, maps_by_depth
from .run_reports import RunReport, likeliest, reports_page
from .waterfalls import Waterfall, logit_waterfall

__all__ = [
    "HeadMaps",
    "OperatorMaps",
    "PromptComparison",
    "RunReport",
    "Waterfall",
    "compare_prompts",
    "likeliest",
    "logit_waterfall",
    "maps_by_depth",
    "maps_of_heads",
    "reports_page",
]
