"""The study's scripts: a student that was stopped goes on, a warm start fits, roles by hand."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from models import HookedTransformer, quiet

from tensorlens_tl import demo

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import distilled_roles

pytestmark = pytest.mark.algebra

BOS_A_B = torch.tensor([0, 1, 2, 1, 2])


def test_roles_by_hand():
    """Row 3 is the second A: an earlier copy at 1, and the token after that copy at 2."""
    pattern = torch.zeros(3, 5, 5)
    pattern[:, 0, 0] = 1
    pattern[0, 1:].diagonal(0)[:] = 1  # the token before
    pattern[1, 1:, 0], pattern[1, 3, 0], pattern[1, 3, 1], pattern[1, 4, 2] = 1, 0.5, 0.5, 0.2
    pattern[2, 1:, 0], pattern[2, 3, 2], pattern[2, 4, 3] = 0, 0.75, 0.25
    found = distilled_roles.looks(pattern, BOS_A_B)
    assert found[0].tolist() == [1.0, 0.0, 1.0]  # 3 → 2 and 4 → 3 come after copies, too
    assert found[1].tolist() == pytest.approx([0.25, 0.35, 0.0])
    assert found[2].tolist() == pytest.approx([0.25, 0.0, 0.5])


@pytest.fixture(scope="module")
def study():
    if HookedTransformer is None:
        pytest.skip("the students are HookedTransformers")
    import distillation

    with quiet():
        yield distillation, demo.load_model("hooked").requires_grad_(False)


OPTIONS = {"rows": 2, "factor": 0.3, "map_rows": 1, "ramp": (0.0, 0.0), "steps": 4, "prompts": 2}


@pytest.mark.parametrize("arm", ["hidden", "maps"])
def test_a_student_that_was_stopped_goes_on(study, tmp_path, arm):
    """From its file, to the same weights bit by bit; another setting is refused."""
    distillation, teacher = study
    options, setting = argparse.Namespace(**OPTIONS), {"steps": 4}

    def new():
        return distillation.Student(arm, 0, options, teacher)

    def steps(student):
        stream = distillation.batches(2, 0)
        for step in range(OPTIONS["steps"]):
            ids, weights = next(stream)
            if step == student.done and step < stops:
                student.step(distillation.Teacher(teacher, ids, weights, step), 1e-3)
        return student

    stops = 4
    whole = steps(new())
    stops = 2
    steps(new()).keep(tmp_path, setting)
    half = new()
    half.resume(tmp_path, setting)
    assert half.done == 2 and half.seconds > 0
    stops = 4
    steps(half)
    assert all(torch.equal(a, b) for a, b in zip(whole.weights, half.weights, strict=True))
    with pytest.raises(SystemExit, match="of another setting"):
        new().resume(tmp_path, {"steps": 5})


def test_a_warm_start_of_the_same_width_is_the_teachers_heads(study):
    """With all directions and ranks kept, products of heads are the teacher's in another basis."""
    distillation, teacher = study
    from transformer_lens import HookedTransformerConfig

    names = ("d_model", "n_heads", "d_head", "d_mlp", "n_ctx", "d_vocab", "normalization_type")
    same = {name: getattr(teacher.cfg, name) for name in names}
    with quiet():
        student = HookedTransformer(HookedTransformerConfig(n_layers=2, act_fn="gelu_new", **same))
    distillation.warm(student, teacher)
    W, V = teacher.state_dict(), student.state_dict()
    places = [m["embed.W_E"] @ m["unembed.W_U"] for m in (V, W)]
    torch.testing.assert_close(*places, rtol=1e-3, atol=1e-3)
    for theirs, ours in distillation.LAYERS:
        for left, right in (("Q", "K"), ("V", "O")):
            products = []
            for m, layer in ((V, ours), (W, theirs)):
                a, b = (m[f"blocks.{layer}.attn.W_{part}"] for part in (left, right))
                inside = a @ (b.mT if right == "K" else b)
                products.append(m["embed.W_E"] @ inside @ m["embed.W_E"].T)
            torch.testing.assert_close(*products, rtol=1e-3, atol=1e-3)
