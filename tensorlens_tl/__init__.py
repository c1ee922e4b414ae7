"""The TensorLens operator for TransformerLens models: exact, matrix-free, from one forward pass.

>>> import tensorlens_tl
>>> from tensorlens_tl import demo
>>> model = demo.load_model()
>>> logits, lens = model.run_with_tensorlens("The capital of France is")
>>> lens.attribute("Paris").top(1)
[('"France"@4', 15.58...)]

Importing the package gives TransformerLens's model classes the method ``run_with_tensorlens``;
``uninstall`` takes the method off again. The import loads neither torch nor a host. The names below
are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .checks import nearest
from .plugin import capture, install, uninstall

if TYPE_CHECKING:
    from . import demo, distillation, editing, evaluation, features, methods, models, relations
    from .attribution import Attribution, MeanAttribution, mean_attribution
    from .attribution import mean_attribution as attribute
    from .circuits import (
        AblationOptions,
        Circuit,
        Faithfulness,
        FaithfulnessCurve,
        discover,
        faithfulness,
        faithfulness_curve,
        faithfulness_of_many,
        score_edges,
    )
    from .editing import Edit, EditCheck, EditSweep
    from .exhibits import HeadMaps, OperatorMaps, PromptComparison, RunReport, Waterfall
    from .exports import AttributionGraph
    from .graph import Edge, Node
    from .hosts import load_model, unwrap, wrap
    from .lens import SequenceAttribution, TensorLens, load, plan
    from .maps import LinearMap, dot_test
    from .methods import LogitLens, Routing
    from .operator import Capture, CaptureMismatchError, Convention, FrozenTransformer
    from .paths import Paths
    from .refusals import UnsupportedArchitectureError
    from .relations import validity
    from .replacement import FeatureGraph

__version__ = "0.1.0"

_ROOMS = {
    "attribution": ("Attribution", "MeanAttribution", "mean_attribution"),
    "circuits": (
        "AblationOptions",
        "Circuit",
        "Faithfulness",
        "FaithfulnessCurve",
        "discover",
        "faithfulness",
        "faithfulness_curve",
        "faithfulness_of_many",
        "score_edges",
    ),
    "editing": ("Edit", "EditCheck", "EditSweep"),
    "exhibits": ("HeadMaps", "OperatorMaps", "PromptComparison", "RunReport", "Waterfall"),
    "exports": ("AttributionGraph",),
    "graph": ("Edge", "Node"),
    "hosts": ("load_model", "unwrap", "wrap"),
    "paths": ("Paths",),
    "refusals": ("UnsupportedArchitectureError",),
    "lens": ("SequenceAttribution", "TensorLens", "load", "plan"),
    "methods": ("LogitLens", "Routing"),
    "operator": ("Capture", "CaptureMismatchError", "Convention", "FrozenTransformer"),
    "relations": ("validity",),
    "replacement": ("FeatureGraph",),
    "maps": ("LinearMap", "dot_test"),
}
"""The flat API: which room hands out each public name."""

_HOMES = {name: room for room, names in _ROOMS.items() for name in names}
_OLD_NAMES = {"attribute": "mean_attribution"}
"""Earlier names of public functions, kept until 1.0."""

_ELSEWHERE = {
    "evaluate": "evaluation.evaluate",
    "from_pretrained": "load_model",
    **dict.fromkeys(("explain", "run", "trace", "lens", "Lens"), "capture"),
    **dict.fromkeys(("find_circuit", "find_circuits"), "discover"),
    **dict.fromkeys(("baselines", "evaluate_methods"), "methods"),
    "save": "TensorLens.save",
    "edit": "TensorLens.edit",
    "help": "TensorLens, whose methods are the questions",
    "run_with_tensorlens": "capture",
}
"""Where names are that may be looked for here."""

_SUBMODULES = (
    "demo",
    "distillation",
    "editing",
    "evaluation",
    "features",
    "methods",
    "models",
    "relations",
)
"""Rooms that are public by themselves: ``tensorlens_tl.demo`` needs no import of its own."""

__all__ = sorted([*_HOMES, *_OLD_NAMES, "capture", "install", "uninstall"])


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    name = _OLD_NAMES.get(name, name)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_hint(name)}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def _hint(name: str) -> str:
    """What was probably meant by a name that is not there, as a sentence; or nothing."""
    meant = _ELSEWHERE.get(name) or (not name.startswith("_") and nearest(name, __dir__(), 0.75))
    return f". Use tensorlens_tl.{meant}." if meant else ""


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES, "__version__"])


install()
