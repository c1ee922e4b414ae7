"""The public surface, as stored text, and eight results, as stored values: a guard for every move.

Make both anew with ``python tests/test_public_api.py`` where a change is meant.
"""

import inspect
import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from models import TWO_RUNS, HookedTransformer, quiet

import tensorlens_tl
from tensorlens_tl import demo

DATA = Path(__file__).parent / "data"
SURFACE, RESULTS = DATA / "public_api.txt", DATA / "eight_results.json"
SAVED = DATA / "lens_of_the_first_build.safetensors"
SUBMODULES = {
    "tensorlens_tl.demo": tensorlens_tl.demo.__all__,
    "tensorlens_tl.evaluation": ("evaluate",),
    "tensorlens_tl.lens": ("TensorLens", "load"),
    "tensorlens_tl.methods": ("METHODS",),
    "tensorlens_tl.models": tensorlens_tl.models.__all__,
    "tensorlens_tl.relations": ("Relation", "decode", "state", "validity"),
}
PROMPT = "When Mary and John went to the store, John gave a drink to"
TWIN = "When Mary and John went to the store, Mary gave a drink to"


def surface() -> str:
    """Every public name with its signature; every public method and property of a public class."""
    lines = []
    homes = {"tensorlens_tl": tensorlens_tl.__all__} | SUBMODULES
    for module, names in homes.items():
        for name in names:
            lines += _described(f"{module}.{name}", getattr(import_module(module), name))
    return "\n".join(lines) + "\n"


def _described(name: str, thing: object) -> list[str]:
    if inspect.isclass(thing):
        members = [
            line
            for key in sorted(dir(thing))
            if not key.startswith("_") and _ours(thing, key)
            for line in _described(f"{name}.{key}", inspect.getattr_static(thing, key))
        ]
        return [f"{name}{_signature(thing)}", *members]
    if isinstance(thing, staticmethod | classmethod):
        thing = thing.__func__
    return [f"{name}{_signature(thing)}" if inspect.isfunction(thing) else name]


def _ours(cls: type, key: str) -> bool:
    return any(key in vars(c) for c in cls.__mro__ if c.__module__.startswith("tensorlens_tl"))


def _signature(thing: object) -> str:
    """Names and defaults: annotations are the type checker's."""
    try:
        found = inspect.signature(thing)
    except ValueError:
        return ""
    plain = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    shown = str(found.replace(parameters=plain, return_annotation=found.empty))
    return shown.replace("tensorlens_tl.", "").replace(" at 0x", " at ").split(" object at ")[0]


@pytest.mark.algebra
def test_public_surface():
    assert surface() == SURFACE.read_text()


# --- Eight results --------------------------------------------------------------------------------


def results() -> dict[str, dict[str, float]]:
    """Numbers by label, of one question to each part of the library, in float64."""
    model = demo.load_model().to(torch.float64)
    pairs = demo.prompts("ioi", 4)
    texts, corrupted = [p.clean for p in pairs], [p.corrupted for p in pairs]
    goal = {"target": [p.answer for p in pairs], "versus": [p.foil for p in pairs]}
    _, lens = tensorlens_tl.capture(model, PROMPT)
    _, other = tensorlens_tl.capture(model, TWIN)
    both = {"baseline": other, "at": "secant", "qk": True}
    matrix = lens.token_matrix("in_out", "Mary").values.flatten().tolist()
    circuit = tensorlens_tl.discover(model, texts, corrupted, *goal.values(), n_edges=24)
    proof = circuit.faithfulness(model, texts, corrupted, **goal)
    means = tensorlens_tl.attribute(model, texts, goal["target"], by="component")
    saved = tensorlens_tl.load(SAVED, model=demo.load_model())
    return {
        "token": _table(lens.attribute("Mary", versus="John")),
        "secant edge": _table(lens.attribute("Mary", versus="John", by="edge", **both)),
        "in_out matrix": {str(i): x for i, x in enumerate(matrix)},
        "paths": {str(p): p.contribution for p in lens.paths("Mary", k=5).paths},
        "discover": {str(edge): circuit.scores[edge] for edge in circuit.edges},
        "faithfulness": {k: _mean(getattr(proof, k)) for k in ("full", "ablated", "circuit")},
        "means": {
            str(node): x for node, x in zip(means.nodes, means.mean.tolist(), strict=True) if x
        },
        "file": _table(saved.attribute("Paris", by="component")),
    }


def _table(attribution) -> dict[str, float]:
    """The 60 largest rows; a Bridge has no row for a bias of zeros."""
    rows = (
        (a, x)
        for a, x in zip(attribution.labels[0], attribution.values[0].tolist(), strict=True)
        if x
    )
    return dict(sorted(rows, key=lambda row: -abs(row[1]))[:60])


def _mean(values) -> float:
    return float(torch.as_tensor(values, dtype=torch.double).mean())


@pytest.mark.offered(HookedTransformer is not None)
def test_eight_results_are_what_they_were():
    """To 1e-9 of a table's largest value; the file was captured in float32, by the first build."""
    stored = json.loads(RESULTS.read_text())
    with quiet(), torch.no_grad():
        found = results()
    assert found.keys() == stored.keys()
    for question, table in stored.items():
        largest = max(map(abs, table.values()))
        tolerance = 1e-5 if question == "file" else TWO_RUNS
        assert found[question].keys() == table.keys(), question
        for label, value in table.items():
            assert abs(found[question][label] - value) <= tolerance * largest, (question, label)


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    SURFACE.write_text(surface())
    with torch.no_grad():
        if not SAVED.exists():
            _, short = tensorlens_tl.capture(demo.load_model(), "The capital of France is")
            short.save(SAVED)
        RESULTS.write_text(json.dumps(results(), indent=1, ensure_ascii=False) + "\n")
