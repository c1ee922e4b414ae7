"""The TensorLens operator for TransformerLens models: exact, matrix-free, from one forward pass.

>>> import tensorlens_tl                                          # doctest: +SKIP
>>> logits, lens = model.run_with_tensorlens("When Mary and John went to the store,")  # doctest:
+SKIP

Importing the package gives TransformerLens's model classes that method (``uninstall`` takes it
off) and imports neither torch nor a host: the names below are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .plugin import capture, install, uninstall, wrap

if TYPE_CHECKING:
    from .attribution.mean_attribution import MeanAttribution, attribute
    from .attribution.paths import Paths
    from .attribution.table import Attribution
    from .circuits.ablation import faithfulness, faithfulness_curve, faithfulness_of_many
    from .circuits.circuit import Circuit
    from .circuits.discovery import discover
    from .circuits.edge_baselines import score_edges
    from .circuits.faithfulness_result import Faithfulness, FaithfulnessCurve
    from .graph.nodes import Edge, Node
    from .hosts.loading import load_model
    from .hosts.self_check import CaptureMismatchError
    from .hosts.supported import UnsupportedArchitectureError
    from .lens.tensor_lens import TensorLens, load
    from .operator.capture import Capture, Convention
    from .operator.frozen_transformer import FrozenTransformer
    from .relations.validity_study import validity
    from .sublayers.linear_map import LinearMap, dot_test

__version__ = "0.1.0"

_HOMES = {
    "UnsupportedArchitectureError": "hosts.supported",
    "Attribution": "attribution.table",
    "Edge": "graph.nodes",
    "MeanAttribution": "attribution.mean_attribution",
    "attribute": "attribution.mean_attribution",
    "discover": "circuits.discovery",
    "Capture": "operator.capture",
    "CaptureMismatchError": "hosts.self_check",
    "Circuit": "circuits.circuit",
    "Convention": "operator.capture",
    "Faithfulness": "circuits.faithfulness_result",
    "FaithfulnessCurve": "circuits.faithfulness_result",
    "FrozenTransformer": "operator.frozen_transformer",
    "Node": "graph.nodes",
    "Paths": "attribution.paths",
    "TensorLens": "lens.tensor_lens",
    "load_model": "hosts.loading",
    "validity": "relations.validity_study",
    "LinearMap": "sublayers.linear_map",
    "dot_test": "sublayers.linear_map",
    "faithfulness": "circuits.ablation",
    "faithfulness_curve": "circuits.ablation",
    "faithfulness_of_many": "circuits.ablation",
    "load": "lens.tensor_lens",
    "score_edges": "circuits.edge_baselines",
}

__all__ = [
    "Attribution",
    "Capture",
    "CaptureMismatchError",
    "Circuit",
    "Convention",
    "Edge",
    "Faithfulness",
    "FaithfulnessCurve",
    "FrozenTransformer",
    "LinearMap",
    "MeanAttribution",
    "Node",
    "Paths",
    "TensorLens",
    "UnsupportedArchitectureError",
    "attribute",
    "capture",
    "discover",
    "dot_test",
    "faithfulness",
    "faithfulness_curve",
    "faithfulness_of_many",
    "install",
    "load",
    "load_model",
    "score_edges",
    "uninstall",
    "validity",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


install()
