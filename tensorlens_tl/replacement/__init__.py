"""Transcoders in the place of MLPs: the attribution graph of features, errors, tokens and targets.

Key concepts:
    ReplacementModel: A frozen run with transcoders in the place of its MLPs.
    FeatureGraph: What every feature and target is made of, its scores, and what pruning keeps.
"""

from .feature_graph import FeatureGraph
from .frozen_model import ReplacementModel
from .search import find_feature_graph, plan_feature_graph

__all__ = ["FeatureGraph", "ReplacementModel", "find_feature_graph", "plan_feature_graph"]
