"""All that a public call returns or is: its table, its JSON, and how it takes wrong names."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pkgutil import walk_packages
from types import FunctionType

import pytest
import torch
from models import quiet

import tensorlens_tl
from tensorlens_tl import demo, editing, evaluation, features, models, relations
from tensorlens_tl.relations.decoding_study import Decoding, RelationStudy

ROOMS = (tensorlens_tl, demo, editing, evaluation, features, models, relations)
NO_RESULTS = {
    "what is asked": ("Capture", "FrozenTransformer", "RestrictedTransformer", "TensorLens"),
    "maps and what they are made of": (
        "Chain",
        "LinearMap",
        "LinearRelation",
        "Maps",
        "Normed",
        "Segment",
    ),
    "what is read of a dictionary": ("Feature", "FeatureDictionary"),
    "names, choices and prompts": (
        *("Convention", "Edge", "Frame", "Node", "PromptPair", "ScoreWeights", "Statements"),
        "Target",
        "Wiring",
    ),
    "tensors of a sweep": ("Trace",),
    "rows of another result": ("Decoding", "ErrorCurve", "GraphLink", "Reading", "Sent", "View"),
}
"""Classes that public calls return and that are no result of their own, by what they are."""

COLUMNS = {
    "absolute": "share recovered by the edges of the largest absolute scores",
    "ablated": "metric with every edge ablated",
    "before": "target before an edit",
    "beta": "chosen factor of a relation's map",
    "chunks": "number of pieces of work",
    "causality": "share of edits that come true",
    "ceiling": "share of whole patches that come true",
    "circuit": "metric of the circuit",
    "contributions": "sum of absolute contributions",
    "dest": "name of what reads",
    "draw": "number of a draw of training subjects",
    "echoes": "number of misses that are a training subject's token",
    "edge": "name of an edge",
    "edit": "number of an edit",
    "edit_layer": "block chosen for edits",
    "edit_rank": "rank chosen for edits",
    "empty": "metric of the empty circuit",
    "expert": "number of an expert",
    "factor": "what an edit was multiplied by",
    "faithfulness": "share decoded to the model's own next token",
    "flops": "floating-point operations",
    "full": "metric of the whole model",
    "head": "name of a head",
    "high": "upper end of a 95 % interval",
    "higher": "whether higher numbers are better",
    "id": "id of a token that is said",
    "in_circuit": "whether an edge is in the circuit",
    "jacobian": "what the real model's gradient predicts",
    "k": "number of a singular triple",
    "key_pos": "position that is read",
    "kind": "kind of a direction",
    "kl": "divergence at other positions, in nats",
    "kl_held_out": "divergence on prompts that were held out, in nats",
    "label": "name of a row, for people",
    "layer": "number of a block",
    "logit": "logit read from a residual",
    "low": "lower end of a 95 % interval",
    "masking": "how tokens were masked",
    "mean": "mean over prompts",
    "measure": "name of a measure",
    "memory_limit": "most memory in bytes",
    "method": "name of a method",
    "metric": "number read of a run",
    "missed": "texts decoded to another token",
    "n": "number of values",
    "n_edges": "number of edges",
    "n_test": "number of test subjects",
    "node": "name of a node",
    "nodes": "names of the nodes of a path",
    "norm": "length of an edit",
    "operator": "relative error of the operator",
    "p": "p-value",
    "part": "name of a part of a result",
    "path": "a path in words",
    "pattern": "attention weight",
    "peak_bytes": "most memory in use",
    "pos": "position among the real tokens",
    "positions": "positions of the nodes of a path",
    "predicted": "predicted change of a target",
    "preset": "name of the fractions masked",
    "probability": "softmax of the logits",
    "prompt": "number of a prompt",
    "query_pos": "position that reads",
    "rank": "rank among all tokens, from 1",
    "relation": "name of a relation",
    "reads": "the input of a head",
    "real": "change in the real model",
    "score": "score by a method, in its unit",
    "seconds": "time",
    "sem": "standard error of the mean",
    "share": "share of a whole",
    "signed": "share recovered by the edges of the highest scores",
    "singular_value": "singular value",
    "site": "name or block of a residual site",
    "size": "how large, relative to the whole",
    "so_far": "sum of a row and those above it",
    "template": "text that subjects fill",
    "train": "texts of training subjects",
    "variant": "way of fitting a relation",
    "src": "name of what writes",
    "start": "source of a path",
    "step": "name of a sublayer in the order of the run",
    "target": "name of a target",
    "target_value": "a target in the whole run",
    "token": "text of a token",
    "top": "likeliest token before",
    "top_after": "likeliest token after",
    "value": "the number that is asked for, usually in logits",
    "weight": "weight of a router",
    "what": "name of what is planned",
}
"""What a column means, in every result that has it."""


# --- Found by looking, so that new ones are found -------------------------------------------------


@cache
def classes() -> dict[str, type]:
    """Every class of the package by name."""
    found: dict[str, type] = {}
    for module in walk_packages(tensorlens_tl.__path__, "tensorlens_tl."):
        if "__main__" not in module.name and not module.name.startswith("tensorlens_tl.demo."):
            for name, thing in vars(import_module(module.name)).items():
                if inspect.isclass(thing) and thing.__module__ == module.name:
                    found.setdefault(name, thing)
    return found


def returned(call: FunctionType) -> Iterator[type]:
    """The package's classes that a function says it returns."""
    for name in re.findall(r"\w+", str(inspect.unwrap(call).__annotations__.get("return", ""))):
        own = inspect.unwrap(call).__globals__.get(name, classes().get(name))
        if inspect.isclass(own) and own.__module__.startswith("tensorlens_tl"):
            yield own


def members(cls: type) -> Iterator[tuple[str, FunctionType]]:
    """The package's public methods and properties of a class."""
    for name in dir(cls):
        found = inspect.getattr_static(cls, name)
        for part in ("fget", "func", "__func__"):
            found = getattr(found, part, found)
        ours = isinstance(found, FunctionType) and found.__module__.startswith("tensorlens_tl")
        if ours and not name.startswith("_"):
            yield name, found


def functions() -> Iterator[tuple[str, FunctionType]]:
    for room in ROOMS:
        for name in room.__all__:
            if isinstance(thing := getattr(room, name), FunctionType):
                yield f"{room.__name__}.{name}", thing


@cache
def held() -> tuple[type, ...]:
    """Every class that a user can come to hold, by calls of calls."""
    found: dict[type, None] = {}
    waiting = [cls for _, call in functions() for cls in returned(call)]
    while waiting:
        if (cls := waiting.pop()) not in found:
            found[cls] = None
            waiting += [other for _, call in members(cls) for other in returned(call)]
    return tuple(sorted(found, key=lambda cls: cls.__name__))


def results() -> list[type]:
    without = {name for names in NO_RESULTS.values() for name in names}
    return [cls for cls in held() if cls.__name__ not in without]


# --- Tables ---------------------------------------------------------------------------------------


def test_every_result_is_a_table_and_json():
    names = {cls.__name__ for cls in held()}
    assert {name for part in NO_RESULTS.values() for name in part} <= names, "a name is no more"
    assert len(results()) >= 30
    for cls in results():
        for form in ("to_dataframe", "to_json"):
            assert callable(getattr(cls, form, None)), f"{cls.__name__} has no {form}"


@cache
def made() -> dict[str, object]:
    """One of every result."""
    pairs = demo.prompts("ioi", 3)
    texts, twins = [p.clean for p in pairs], [p.corrupted for p in pairs]
    cases = [(p.clean, p.corrupted, p.answer, p.foil) for p in pairs[:2]]
    with quiet(), torch.no_grad():
        model = demo.load_model()
        lens, other = (
            tensorlens_tl.capture(model, text)[1]
            for text in ("The capital of France is", "The capital of Italy is")
        )
        circuit = lens.discover("Paris", n_edges=20)
        given = {"target": [p.answer for p in pairs], "versus": [p.foil for p in pairs]}
        edit = lens.edit("Paris", versus="Rome", by=-2.0, site=2)
        study = evaluation.evaluate(model, texts, ["random", "last_layer_attention"])
        edits = editing.evaluate(model, cases, sites=[2], methods=("operator", "random"))
        row = study.row("random", study.rows[0].measure)
        graph = lens.attribution_graph("Paris", n_nodes=8)
        W = torch.eye(128)
        weights = {"W_enc": W, "W_dec": W, "b_enc": W[0] * 0, "b_dec": W[0] * 0}
        point = "blocks.3.hook_resid_mid"
        one = features.load(weights, site=point, writes="blocks.3.hook_mlp_out")
        routing = tensorlens_tl.Routing(
            0, (("A", "cat"),), ((0, 2),), torch.tensor([[[0], [1]]]), torch.ones(1, 2, 1), 2
        )
        decoded = Decoding("capital", "{} is", 0, ("France",), 1, "operator", 1.0, (), 0)
        found = [
            lens.attribute("Paris"),
            tensorlens_tl.mean_attribution(model, texts),
            lens.paths("Paris", k=2),
            circuit,
            circuit.faithfulness(model, texts, twins, **given),
            tensorlens_tl.faithfulness_curve(model, texts, circuit.scores, twins, **given),
            lens.circuit(circuit),
            lens.circuit(circuit).share("Paris"),
            lens.plan("attribute"),
            edit,
            edit.check(model),
            edit.sweep(model, [0.5, 1.0]),
            lens.rank_edits("Paris"),
            edits,
            editing.predict(model, cases, site=2),
            row,
            row.estimate(),
            study,
            study.compare("random", "last_layer_attention", row.measure),
            lens.compare(other, "Paris", "Rome"),
            lens.head_maps(["L1H0"], "Paris"),
            lens.operator_maps("Paris"),
            lens.report(target="Paris", versus="Rome"),
            lens.waterfall("Paris", "Rome"),
            graph,
            lens.feature_graph(one, "Paris", max_features=5),
            lens.attribute_sequence(5),
            lens.logit_lens(),
            routing,
            lens.token_scores("in_out"),
            lens.token_matrix("norm"),
            lens.operator.svd(2),
            RelationStudy("demo", "float32", 0, (1.0,), (8,), {"capital": 1.0}, (decoded,)),
            tensorlens_tl.validity(model, [p.clean for p in demo.prompts("ioi", 3)]),
        ]
    return {type(one).__name__: one for one in found}


@pytest.mark.parametrize("name", [cls.__name__ for cls in results()])
def test_one_name_means_one_thing(name):
    """Columns are known names, and those of the rows in JSON."""
    result = made()[name]
    frame, data = result.to_dataframe(), json.loads(result.to_json())
    assert len(frame) and isinstance(data, dict)
    if name in ("TokenMatrix", "SequenceAttribution"):  # tokens down and across
        return
    assert set(frame.columns) <= COLUMNS.keys()
    if "rows" in data and name not in ("Evaluation", "RelationStudy", "ValidityStudy"):  # as fields
        assert {column for row in data["rows"] for column in row} == set(frame.columns)


# --- Names of arguments ---------------------------------------------------------------------------


INTERNAL = ("Chain", "Frame", "Segment", "Target", "Wiring")
"""Classes whose methods are not in the reference."""


def public_calls() -> dict[str, FunctionType]:
    found = dict(functions())
    for cls in held():
        for name, call in members(cls):
            static = inspect.getattr_static(cls, name)
            methods_ = FunctionType | classmethod | staticmethod
            if cls.__name__ not in INTERNAL and isinstance(static, methods_):
                found[f"{cls.__name__}.{name}"] = call
    return found


def test_a_misspelt_argument_is_named():
    """At every public call that ``checks.spelled`` decorates, and no other is public."""
    calls = public_calls()
    assert len(calls) >= 250
    for name, call in calls.items():
        parameters = inspect.signature(call).parameters
        own = [n for n in parameters if n not in ("self", "cls") and len(n) > 4]
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            if not own:  # passes on all that it gets
                continue
            word, match = f"{own[0]}_", rf"There is no argument {own[0]}_= of .*{own[0]}=\?"
        else:
            word, match = (
                "misspelt",
                "There is no argument misspelt= of .*(Use|Did you mean|Call it without)",
            )
        with pytest.raises(ValueError, match=match):
            call(**{word: 1})
            pytest.fail(f"{name} takes {word}=")
