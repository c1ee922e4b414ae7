"""Where a logit comes from: targets, splits, edges, differences, paths, means over prompts.

Key concepts:
    Target: A linear functional u · y + c of the final normalized residual at one position.
    TargetGradient: One target pulled back to every residual site; every split reads it.
    Attribution: A table of contributions that prints, sums, sorts and saves itself.
"""

from .averages import MeanAttribution, mean_attribution
from .contrast import check_comparable, difference, fixed_baseline, mean_embedding
from .edges import Writers, edge_products, frozen_readers, plan_edges
from .head_loadings import loadings
from .html import PROMPTS, UNIT, grid_html, legend_html, more_prompts, patch_map, strip_html
from .splits import attribute, attribute_many, check_split, queries_and_keys
from .table import Attribution, Source
from .table_builder import TableBuilder, check_sum
from .target_gradient import (
    GradientCache,
    TargetGradient,
    resolve_at_site,
    resolve_each,
    resolve_prompts,
)
from .targets import (
    Target,
    TargetLike,
    expected_others,
    is_token,
    likeliest_others,
    own_prediction,
    resolve,
    resolve_target,
    resolve_token,
)

__all__ = [
    "PROMPTS",
    "Attribution",
    "GradientCache",
    "MeanAttribution",
    "Source",
    "TableBuilder",
    "Target",
    "TargetGradient",
    "TargetLike",
    "UNIT",
    "Writers",
    "attribute",
    "attribute_many",
    "check_comparable",
    "check_split",
    "check_sum",
    "difference",
    "expected_others",
    "edge_products",
    "fixed_baseline",
    "frozen_readers",
    "grid_html",
    "is_token",
    "legend_html",
    "likeliest_others",
    "loadings",
    "mean_attribution",
    "mean_embedding",
    "more_prompts",
    "own_prediction",
    "patch_map",
    "plan_edges",
    "queries_and_keys",
    "resolve",
    "resolve_at_site",
    "resolve_each",
    "resolve_prompts",
    "resolve_target",
    "resolve_token",
    "strip_html",
]
