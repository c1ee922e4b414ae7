"""Nothing is made on torch's default device but what is meant to be: "meta" computes nothing."""

import pytest
import torch
from comparisons import assert_close
from models import CASES, ROUNDING, SHAPES, lens_of, quiet

from tensorlens_tl.evaluation.significance import compare, estimate, rank_correlation
from tensorlens_tl.maps.linear_map import dot_test
from tensorlens_tl.methods.operator_matrices import orthogonal_probes

pytestmark = pytest.mark.algebra
CHOSEN = [CASES.get("hooked-gpt2") or SHAPES[0], CASES.get("bridge-llama") or SHAPES[-1]]
ASKED = {
    **{
        f"attribute {by}": lambda lens, by=by: lens.attribute(3, 4, by=by).values
        for by in ("token", "component", "head", "layer", "edge")
    },
    "q and k": lambda lens: lens.attribute(3, 4, by="edge", qk=True).values,
    "total": lambda lens: lens.attribute(3, 4, by="head", effect="total").values,
    "baseline": lambda lens: lens.attribute(3, 4, baseline="zero").values,
    "loadings": lambda lens: lens.loadings(2, 3, 4).values,
    **{
        kind: lambda lens, kind=kind: lens.token_matrix(kind).values
        for kind in ("norm", "in", "out", "in_out")
    },
    "probes": lambda lens: lens.token_matrix("norm", probes=4).values,
    "bfloat16": lambda lens: lens.token_matrix("norm", precision="bfloat16").values,
    "rollout": lambda lens: lens.token_scores("rollout").values,
    "random": lambda lens: lens.token_scores("random").values,
    "block": lambda lens: lens.operator.block(-1, None),
    "frobenius": lambda lens: lens.operator.frobenius_norm(),
    "svd": lambda lens: lens.operator.svd(3).S,
    "circuit": lambda lens: torch.tensor(
        [*lens.discover(3, 4, n_edges=5).scores.values()], device="cpu"
    ),
    "paths": lambda lens: torch.tensor(
        [path.contribution for path in lens[0].paths(3, 4)], device="cpu"
    ),
    "plan": lambda lens: torch.tensor(lens.plan("svd").flops, device="cpu"),
}


@pytest.mark.parametrize("pattern", ["stored", "recomputed"])
@pytest.mark.parametrize("case", CHOSEN, ids=str)
@pytest.mark.parametrize("asked", ASKED)
def test_a_lens_stays_on_its_models_device(case, pattern, asked, monkeypatch):
    with quiet(), torch.no_grad():
        expected = ASKED[asked](lens_of(case, pattern=pattern))
        monkeypatch.setattr("models._LENSES", {})  # one that nobody asked before: nothing is kept
        lens = lens_of(case, pattern=pattern)
        with torch.device("meta"):
            found = ASKED[asked](lens)
    assert_close(found, expected, ROUNDING)


def test_statistics_and_draws_are_made_on_the_cpu():
    a, b = [0.1 * i for i in range(20)], [0.05 * i * i for i in range(20)]
    lens = lens_of(CHOSEN[0])

    def all_of_them():
        probes = orthogonal_probes(3, 2, 8, torch.Generator().manual_seed(0))
        few = compare(a[:5], b[:5]).p
        return estimate(a), compare(a, b), few, rank_correlation(a, b), probes.tolist()

    expected, exact = all_of_them(), dot_test(lens.operator)
    with torch.device("meta"):
        assert all_of_them() == expected
        assert dot_test(lens.operator) == exact <= 1e-14
