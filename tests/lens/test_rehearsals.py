"""Any call planned by a rehearsal: its flops and bytes are those of the call itself."""

import inspect
from functools import partial

import models
import pytest
import torch
from models import SHAPES
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import tensorlens_tl
from tensorlens_tl import TensorLens, demo, evaluation, plan, relations
from tensorlens_tl.evaluation import evaluate
from tensorlens_tl.relations import Relation, statements

pytestmark = pytest.mark.algebra

FIRST = SHAPES[0]


class Counted(TorchDispatchMode):
    """Flops of what runs under it, and the most bytes that its results hold at once."""

    def __init__(self):
        super().__init__()
        self.flops = self.peak = 0
        self.held = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        given = {x.untyped_storage()._cdata for x in tree_leaves(args) if torch.is_tensor(x)}
        for x in tree_leaves(out):
            if torch.is_tensor(x) and x.is_floating_point():
                storage = x.untyped_storage()
                if storage._cdata in given and storage._cdata not in self.held:
                    continue  # a view of what was there before
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.held = {key: one for key, one in self.held.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return out


def counted(call, *args, **kwargs):
    with Counted() as found:
        call(*args, **kwargs)
    return found


def ids(seed=3):
    return models.tokens(2, 5, seed=seed)


def small_relation():
    whole = demo.relation("capital")
    return Relation("capital", whole.templates[:1], whole.samples[:4])


FUNCTIONS = {
    "capture": lambda m: ((m, ids()), {}),
    "mean_attribution": lambda m: ((m, ids()), {"target": 3}),
    "discover": lambda m: ((m, ids(), ids(4), 3), {"n_edges": 5}),
    "score_edges": lambda m: ((m, ids(), ids(4), "eap_ig", 3), {"steps": 2}),
    "faithfulness": lambda m: ((m, ids(), ["L0H0", "L1H1"], ids(4), 3), {}),
    "faithfulness_of_many": lambda m: ((m, ids(), {"a": ["L0H0"]}), {"ablation": "zero"}),
    "faithfulness_curve": lambda m: ((m, ids(), ["L0H0→logits"], ids(4), 3), {"sizes": (0.1, 1)}),
    "evaluate": lambda m: ((m, ids(), ["in_out", "random"]), {}),
    "validity": lambda m: ((m, models.tokens(3, 3)), {"kinds": ("swap",), "sizes": (0.1,)}),
}
"""Calls that run the model on prompts, with small arguments."""
OF_TEXTS = {"decode", "state"}
"""Those whose prompts are texts: they run the bundled model."""
METHODS = {
    "attribute": {"target": 3, "by": "component", "effect": "total"},
    "attribute_many": {"pos": range(2), "by": "head"},
    "edit": {"target": 3, "by": 1.0, "site": 0, "keep": [4]},
    "operator_maps": {"sites": (1,)},
    "paths": {"target": 3, "k": 3},
    "token_matrix": {"name": "value_zeroing"},
    "token_scores": {"name": "attnlrp", "target": 3},
    "verify": {},
}
"""Questions to a lens that are worth more than one sweep, with small arguments."""


def function(name):
    home = relations if hasattr(relations, name) else evaluation
    return getattr(tensorlens_tl, name, None) or getattr(home, name)


def test_every_call_that_runs_a_model_is_planned():
    """All public functions of a model and prompts are in the tables above."""
    rooms = (tensorlens_tl, evaluation, relations)
    public = {name: getattr(room, name) for room in rooms for name in room.__all__}
    heavy = {
        getattr(call, "__name__", name)
        for name, call in public.items()
        if inspect.isfunction(call)
        and "model" in (own := inspect.signature(call).parameters)
        and {"input", "prompts", "relation", "relations"} & set(own)
    }
    assert heavy == {*FUNCTIONS, *OF_TEXTS}


def assert_told(told, call):
    """Within a fifth: what a plan says, and what is counted."""
    assert abs(told.flops / call.flops - 1) <= 0.2
    assert abs(told.peak_bytes / call.peak - 1) <= 0.2
    assert 0 < told.seconds < 60


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_function_costs(name):
    model, call = FIRST.model(), function(name)
    args, kwargs = FUNCTIONS[name](model)
    kwargs |= {"progress": False} if "progress" in inspect.signature(call).parameters else {}
    before = call(*args, **kwargs)  # the host is compared with once a model
    told = plan(call, *args, **kwargs)
    assert told.what == name
    assert repr(call(*args, **kwargs)) == repr(before)  # nothing of the rehearsal is left
    assert_told(told, counted(call, *args, **kwargs))


@pytest.mark.parametrize("name", METHODS)
def test_what_a_question_costs(name):
    held, kwargs = models.lens_of(FIRST)[0].capture, dict(METHODS[name])
    if name == "token_scores":
        kwargs["model"] = FIRST.model()
    lens, other = (TensorLens(held.mapped(lambda tensor: tensor)) for _ in range(2))
    told = lens.plan(name, **kwargs)
    assert "operator" not in vars(lens)  # nothing of the rehearsal is left
    assert_told(told, counted(getattr(other, name), **kwargs))


def test_what_a_function_of_texts_costs(monkeypatch):
    model, made, plain = demo.load_model(), [], statements.Statements
    noted = lambda **own: made.append(own["first"]) or plain(**own)  # noqa: E731
    monkeypatch.setattr(statements, "Statements", noted)
    told = plan(relations.state, model, small_relation(), layers=(1,))
    assert_told(told, counted(relations.state, model, small_relation(), layers=(1,)))
    # Subjects have answers of their own, so that studies of them can be rehearsed.
    assert made[0].tolist() == [0, 1, 2, 3]


def test_what_an_edit_costs_in_the_model_and_a_padded_batch():
    model = FIRST.model()
    edit = models.lens_of(FIRST)[0].edit(3, site=0, by=0.1)
    least = models.lens_of(FIRST)[0].plan("edit_to_top", token=3, site=0)
    whole = counted(models.lens_of(FIRST)[0].edit_to_top, 3, site=0)
    assert 0 < least.flops <= whole.flops  # the number of rivals is not known before
    told = plan(edit.check, model)
    assert abs(told.flops / counted(edit.check, model).flops - 1) <= 0.2
    texts = ["The capital of France is", "Paris"]
    told = plan(tensorlens_tl.capture, demo.load_model(), texts)
    assert (
        abs(told.flops / counted(tensorlens_tl.capture, demo.load_model(), texts).flops - 1) <= 0.2
    )


def test_a_rehearsal_writes_nothing_and_refuses_what_the_call_refuses(tmp_path):
    model, lens = FIRST.model(), models.lens_of(FIRST)
    plan(evaluate, model, ids(), ["random"], resume=tmp_path / "run")
    plan(tensorlens_tl.faithfulness, model, ids(), ["L0H0"], ids(4), resume=tmp_path / "run")
    assert not list(tmp_path.iterdir())
    circuit = tensorlens_tl.discover(model, [*ids()], [*ids(4)], 3, n_edges=5)
    assert plan(circuit.faithfulness, model, ids(), ids(4), 3).flops > 0
    for call, match in (
        (lambda: plan(tensorlens_tl.discover, model, ids(), n_edges=0), "n_edges=0"),
        (lambda: plan(tensorlens_tl.discover, model), "missing a required argument: 'prompts'"),
        (lambda: plan(print, model), "cannot be planned. Pass a function of this library"),
        (lambda: plan(lens.operator.svd), "cannot be planned. Pass a function of this library"),
        (lambda: lens.plan("attribute", by="orders"), "by='orders'"),
        (lambda: lens.plan("save", path="x"), "There is no plan of 'save'"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_a_capture_as_a_method_and_with_arguments_fixed():
    model = demo.load_model()
    expected = tensorlens_tl.plan(tensorlens_tl.capture, model, "The capital of France is")
    method = tensorlens_tl.plan(model.run_with_tensorlens, "The capital of France is")
    fixed = tensorlens_tl.plan(partial(tensorlens_tl.capture, model), "The capital of France is")
    assert method.flops == fixed.flops == expected.flops > 0
    with pytest.raises(ValueError, match="call is a method that cannot be planned"):
        tensorlens_tl.plan(model.forward, "The capital of France is")
