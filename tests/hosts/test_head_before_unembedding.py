"""ModernBERT's decoder: gate and up in one matrix, and a head before the unembedding."""

import pytest
import torch
from models import quiet

import tensorlens_tl
from tensorlens_tl import CaptureMismatchError, UnsupportedArchitectureError
from tensorlens_tl.hosts.entry import adapt
from tensorlens_tl.support.configurations import tiny_config
from tensorlens_tl.support.every_name import hugging_face_class, registered
from tensorlens_tl.support.tiny_models import randomize

NAME = "ModernBertDecoderForCausalLM"
pytestmark = pytest.mark.offered(NAME in registered())
IDS = torch.tensor([[5, 9, 11, 7, 20, 3]])


@pytest.fixture(scope="module")
def both():
    cls = hugging_face_class(NAME)
    config = tiny_config(cls.config_class)
    for bias in ("norm", "mlp", "attention", "classifier", "decoder"):
        setattr(config, f"{bias}_bias", True)
    model = cls(config).double().eval()
    randomize(model, seed=1)
    with torch.no_grad():
        plain = model(IDS).logits
    with quiet():
        return tensorlens_tl.wrap(model), plain


@pytest.fixture
def bridge(both):
    return both[0]


def test_the_head_is_part_of_the_operator_also_after_saving(both, tmp_path):
    bridge, plain = both
    with quiet():
        _, lens = tensorlens_tl.capture(bridge, IDS)
    found = lens.attribute(7)
    assert lens.completeness_error < 1e-12
    # Hugging Face makes rotations in float32.
    assert float(found.values.sum()) == pytest.approx(float(plain[0, -1, 7]), abs=1e-6)
    assert {"mlm_head.b", "mlm_head.ln.b"} <= {str(source.node) for source in found.sources}
    lens.save(tmp_path / "lens.safetensors")
    loaded = tensorlens_tl.load(tmp_path / "lens.safetensors", model=bridge)
    assert torch.equal(loaded.attribute(7).values, found.values)


def test_an_edit_of_gate_and_up_together_is_refused(bridge):
    edit = ("blocks.0.mlp.hook_pre", lambda t, hook: t * 1.5)
    with quiet(), bridge.hooks(fwd_hooks=[edit]), pytest.raises(CaptureMismatchError, match="L0"):
        tensorlens_tl.capture(bridge, IDS)


def test_what_reads_an_unembedding_alone_is_refused_by_name(bridge):
    with quiet(), pytest.raises(UnsupportedArchitectureError, match="a head before its unembed"):
        adapt(bridge).require_next_token("evaluate")
    with quiet():
        _, lens = tensorlens_tl.capture(bridge, IDS)
    with pytest.raises(ValueError, match="has a head before it"):
        lens.attribute_sequence(-2)
