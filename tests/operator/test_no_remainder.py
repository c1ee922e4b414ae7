"""With T = 0 and the logits as the constant every sum still holds: the oracles must fail."""

from functools import partial

import pytest
import test_attribution
import test_differences
import test_granularity
import test_operator
import test_paths
import torch
from models import ROUNDING, SHAPES, lens_of

from tensorlens_tl.operator.capture import CaptureMismatchError
from tensorlens_tl.operator.frozen_transformer import FrozenTransformer
from tensorlens_tl.operator.residual_stream import Pull, Trace

pytestmark = pytest.mark.algebra

CASE = next(case for case in SHAPES if case.name in ("hooked-gpt2", "bridge-gpt2"))


def final(operator):
    """The run's own final normalized residual, which no sublayer of the operator enters."""
    norm, x = operator.ln_final, operator.run_final
    return norm.apply(x) + norm.bias


@pytest.fixture
def nothing(monkeypatch):
    """T = 0, bias = the run's own final residual; a sweep finds no covector and one constant."""
    of = FrozenTransformer.of.__func__

    def keep(cls, capture):
        operator = of(cls, capture)
        object.__setattr__(operator, "run_final", capture.resid_final)
        return operator

    def pull(self, u, query=None):
        shares = {"ln_final.b": (u * final(self)).sum(-1)}
        zero = torch.zeros_like(u)
        kept = []
        for step in self.steps:
            found = []
            for branch in step.branches:
                pulled = branch.pull(zero)
                effects = {name: torch.zeros_like(e) for name, e in pulled.effects.items()}
                found.append(Pull(zero, torch.zeros_like(pulled.kept), effects))
            kept.append(tuple(found))
        n = len(self.steps)
        sites = (*[zero] * (n + 1), u), (zero,) * n
        return Trace(*sites, tuple(kept), shares, dict(shares))

    def apply_t(self, y, effects=None):
        if effects is not None:
            effects["ln_final.b"] = (y * final(self)).sum(-1)
        return torch.zeros_like(y)

    monkeypatch.setattr("models._LENSES", {})
    monkeypatch.setattr(FrozenTransformer, "of", classmethod(keep))
    monkeypatch.setattr(FrozenTransformer, "apply", lambda self, x: torch.zeros_like(x))
    monkeypatch.setattr(FrozenTransformer, "apply_t", apply_t)
    monkeypatch.setattr(FrozenTransformer, "bias", property(final))
    monkeypatch.setattr(FrozenTransformer, "pull", pull)


def test_such_an_operator_is_complete(nothing):
    """So no check of completeness alone sees that it explains nothing."""
    lens = lens_of(CASE)
    assert lens.completeness_error <= ROUNDING
    for by in ("token", "constant"):
        assert lens.attribute(3, 4, by=by).completeness_error <= ROUNDING
    token = lens.attribute(3, 4)
    assert not any(
        token.values[:, i].any() for i, s in enumerate(token.sources) if s.pos is not None
    )


g, a, d = test_granularity, test_attribution, test_differences
ORACLES = {
    "token: the frozen real model's gradient": partial(
        a.test_token_contributions_are_gradient_times_input_of_the_frozen_model, CASE
    ),
    "operator: gradient, curvature": partial(
        test_operator.test_gradient_and_curvature_of_the_frozen_model, CASE, "gate"
    ),
    "total: injection into the frozen real model": partial(
        g.test_totals_are_what_injecting_a_writers_output_into_the_real_model_changes, CASE
    ),
    "layer": partial(g.test_a_layers_total_is_the_change_over_it, CASE),
    "edge: sums": partial(
        g.test_edges_into_a_reader_sum_to_what_it_makes_of_the_target, CASE, "gate"
    ),
    "difference: fixed baselines": partial(
        d.test_fixed_baselines_run_no_second_pass_and_have_no_operator_term, CASE
    ),
    "difference: edges": partial(d.test_edges_of_a_difference, CASE),
    "loadings": d.test_loadings_are_what_zeroing_a_heads_values_for_this_state_takes,
    "paths": partial(test_paths.test_paths_from_a_token_sum_to_its_attribution, CASE),
}


@pytest.mark.parametrize("oracle", ORACLES)
def test_and_every_oracle_refutes_it(oracle, nothing):
    with pytest.raises((AssertionError, CaptureMismatchError)):  # by the library's own guard, too
        ORACLES[oracle]()


@pytest.mark.parametrize("oracle", ORACLES)
def test_the_oracles_themselves_hold(oracle):
    ORACLES[oracle]()
