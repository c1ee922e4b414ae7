"""Features of sparse autoencoders and transcoders, as nodes of the operator.

Key concepts:
    FeatureDictionary: An SAE or a transcoder as its weights; :func:`load` reads them from anywhere.
    Feature: One feature as a target: why did it fire?
    Reading: Which features fire at a site of a run, and the error that they leave.
"""

from .dictionary import Feature, FeatureDictionary
from .edges import by_feature_edge
from .places import Place
from .reading import Reading, check_fits, check_model, check_width, decoded
from .sources import load
from .splits import by_feature, error_shares, plan_by_feature
from .targets import feature_target, site_of_target

__all__ = [
    "Feature",
    "FeatureDictionary",
    "Place",
    "Reading",
    "by_feature",
    "by_feature_edge",
    "check_fits",
    "check_model",
    "check_width",
    "decoded",
    "error_shares",
    "feature_target",
    "load",
    "plan_by_feature",
    "site_of_target",
]
