"""Edges that make a behaviour: found, kept in files, proved in the real model.

Key concepts:
    Circuit: Some edges of a model, with their scores; saved as JSON.
    discover: Finds a circuit over many prompts.
    faithfulness: Tests a circuit in the real model, with every other edge ablated.
"""

from .ablation import AblationOptions, faithfulness, faithfulness_curve, faithfulness_of_many
from .circuit import Circuit, select_circuit
from .discovery import discover
from .edge_averages import edge_scores
from .edge_baselines import plan_score_edges, score_edges
from .faithfulness_result import Faithfulness, FaithfulnessCurve
from .model_id import ModelInfo
from .subgraph import Subgraph, circuit_from_names

__all__ = [
    "AblationOptions",
    "Circuit",
    "Faithfulness",
    "FaithfulnessCurve",
    "ModelInfo",
    "Subgraph",
    "circuit_from_names",
    "discover",
    "edge_scores",
    "faithfulness",
    "faithfulness_curve",
    "faithfulness_of_many",
    "plan_score_edges",
    "score_edges",
    "select_circuit",
]
