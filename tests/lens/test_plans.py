"""What calls cost, told before they run."""

import warnings

import models
import pytest
import torch
from models import SHAPES
from torch.utils.flop_counter import FlopCounterMode

import tensorlens_tl
from tensorlens_tl import TensorLens, demo
from tensorlens_tl.recording import run

FIRST = SHAPES[0]


@pytest.mark.parametrize("pattern", ["stored", "recomputed"])
def test_flops_of_a_split_by_token(pattern):
    """Those that torch counts, within a twentieth."""
    prompt = "When Mary and John went to the store, John gave a drink to"
    lens = tensorlens_tl.capture(demo.load_model(), prompt, pattern=pattern)[1]
    plan = lens.plan("attribute", target="Mary")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        TensorLens(lens.capture).attribute("Mary")
    assert abs(plan.flops / counted.get_total_flops() - 1) <= 0.05
    assert 0 < plan.seconds < 60 and 0 < plan.peak_bytes < plan.memory_limit
    assert repr(plan).startswith("Plan(attribute: about ")


def test_what_is_not_planned():
    lens = models.lens_of(FIRST)
    for wrong in ({"by": "edge"}, {"baseline": "zero"}):
        with pytest.raises(ValueError, match="Edges and baselines of attribute cannot be planned"):
            lens.plan("attribute", **wrong)
    with pytest.raises(ValueError, match=r"no plan of 'discover'. Use one of attribute, "):
        lens.plan("discover")


@pytest.mark.parametrize("case", SHAPES[:2], ids=str)
def test_much_memory_for_patterns_is_told(case, monkeypatch):
    blocks = models.lens_of(case).capture.blocks
    taken = sum(block.attn.mix.pattern.nbytes for block in blocks)

    def told(**how):
        with warnings.catch_warnings(record=True) as seen, torch.no_grad():
            warnings.simplefilter("always")
            tensorlens_tl.capture(case.model(), models.tokens(), **how)
        return [str(w.message) for w in seen if "attention patterns" in str(w.message)]

    monkeypatch.setattr(run, "NOTED_BYTES", taken + 1)
    assert told() == []
    monkeypatch.setattr(run, "NOTED_BYTES", taken)
    (note,) = told()
    assert 'Pass pattern="recomputed" to keep' in note
    assert told(pattern="recomputed") == []
