"""A model with a dictionary spliced in by SAELens, or by what has its hook points, is captured."""

import pytest
import torch
from comparisons import assert_close
from dictionaries import by_saelens, dictionary
from models import HOOKED, ORACLE, ROUNDING, HookedTransformer, build_hooked, quiet, tokens
from torch import nn

import tensorlens_tl

PRE, ATTN, Z = "blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.attn.hook_z"


class Spliced(nn.Module):
    """What stands in place of a hook point, and ends at a hook point of SAELens's name."""

    def __init__(self, sae, point, error):
        super().__init__()
        self.sae, self.error, self.hook_sae_output = sae, error, point

    def forward(self, x):
        y = self.sae.reconstruct(x.flatten(2)).view(x.shape)
        return self.hook_sae_output(y + (x - y) if self.error else y)


def spliced(sae, error):
    """A tiny model with a dictionary in place of its hook point."""
    with quiet():
        model = build_hooked(HOOKED["gpt2"], torch.float64)
    parent, _, last = sae.site.rpartition(".")
    point = type(model.hook_embed)()
    model.get_submodule(parent)._modules[last] = Spliced(sae, point, error)
    model.setup()
    return model


@pytest.mark.skipif(HookedTransformer is None, reason="needs HookedTransformer")
@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("site", [PRE, ATTN, Z])
def test_features_are_sources_and_the_change_is_a_constant(site, error):
    sae = dictionary("topk", site=site)
    model = spliced(sae, error)
    with quiet(), torch.no_grad():
        logits, lens = tensorlens_tl.capture(model, tokens())
        assert_close(logits, model(tokens()), ROUNDING)
        _, whole = tensorlens_tl.capture(build_hooked(HOOKED["gpt2"], torch.float64), tokens())
    assert_close(lens.dla(3).values.sum(1), logits[:, -1, 3], ROUNDING)
    found = lens.attribute(3, by="feature", saes=sae)
    assert found.completeness_error < 1e-12
    # The dictionary reads what stood there before, as in the model without it.
    other = whole.attribute(3, by="feature", saes=sae)
    spots = [{(s.node, s.pos) for s in x.select(kind="feature").sources} for x in (found, other)]
    assert spots[0] == spots[1]
    size = float(found.values.abs().max())
    left = float(found.select(kind="error").values.abs().max())
    name = f"L1.{site.rpartition('.')[2]}[sae]"
    parts = lens.attribute(3, by="component", effect="total")
    own = [i for i, s in enumerate(parts.sources) if str(s.node) == name]
    if error:
        assert left > 1e-3 * size and not own
        return
    assert left < 1e-12 * size
    assert own
    with pytest.raises(ValueError, match="An SAE stands in place of"):
        lens.feature_faithfulness(model, sae, [], 3)


@pytest.mark.skipif(HookedTransformer is None, reason="needs HookedTransformer")
def test_the_constant_is_what_the_dictionary_left_out():
    sae = dictionary("topk", site=PRE)
    with quiet(), torch.no_grad():
        _, lens = tensorlens_tl.capture(spliced(sae, False), tokens())
        _, whole = tensorlens_tl.capture(build_hooked(HOOKED["gpt2"], torch.float64), tokens())
    x = whole.operator.states()[PRE]
    moved = ((sae.reconstruct(x) - x) * lens.covector(3, site=PRE)).sum(-1)
    parts = lens.attribute(3, by="component", effect="total")
    at = [i for i, s in enumerate(parts.sources) if str(s.node) == "L1.hook_resid_pre[sae]"]
    assert_close(parts.values[:, at], moved, ORACLE)
    feature = sae.feature(3, pre=True)
    assert whole.attribute(feature).sums_to_target
    with pytest.raises(ValueError, match="An SAE is spliced in where the feature reads"):
        lens.attribute(feature)


def test_models_of_saelens_are_captured():
    """In a process of its own, as the import takes long and belongs to no user of this library."""
    cases = by_saelens("splice_saelens.py")
    assert len(cases) == 16
    for name, case in cases.items():
        error = name.endswith("True")
        assert max(case["logits"], case["real"], case["b_U"], *case["sums"]) < 1e-12, name
        assert case["features"] > 0 and (case["moved"] < 1e-12) == error, name
        assert (case["error"] < 1e-12) != error and bool(case["constants"]) != error, name
