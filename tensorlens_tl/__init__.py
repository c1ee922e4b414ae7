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
    from .baselines_edges import score_edges
    from .capturing import Capture, Convention
    from .circuits import Circuit
    from .composer import FrozenTransformer
    from .datasets import MeanAttribution, attribute
    from .discovery import discover
    from .graph import Edge, Node
    from .interventions import faithfulness, faithfulness_curve, faithfulness_of_many
    from .lens import TensorLens, load
    from .linear_map import LinearMap, dot_test
    from .paths import Paths
    from .results import Attribution
    from .selfcheck import CaptureMismatchError
    from .shares import Faithfulness, FaithfulnessCurve
    from .supported import UnsupportedArchitectureError

__version__ = "0.1.0"

_HOMES = {
    "UnsupportedArchitectureError": "supported",
    "Attribution": "results",
    "Edge": "graph",
    "MeanAttribution": "datasets",
    "attribute": "datasets",
    "discover": "discovery",
    "Capture": "capturing",
    "CaptureMismatchError": "selfcheck",
    "Circuit": "circuits",
    "Convention": "capturing",
    "Faithfulness": "shares",
    "FaithfulnessCurve": "shares",
    "FrozenTransformer": "composer",
    "Node": "graph",
    "Paths": "paths",
    "TensorLens": "lens",
    "LinearMap": "linear_map",
    "dot_test": "linear_map",
    "faithfulness": "interventions",
    "faithfulness_curve": "interventions",
    "faithfulness_of_many": "interventions",
    "load": "lens",
    "score_edges": "baselines_edges",
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
    "score_edges",
    "uninstall",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


install()
