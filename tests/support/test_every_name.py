"""Every name that the host registers: exact against plain Hugging Face, or refused by name."""

import pytest

from tensorlens_tl.hosts.supported import SUPPORTED
from tensorlens_tl.support.every_name import registered, try_name

NAMES = registered()
SERVED = [name for name in NAMES if name in SUPPORTED]
COMPATIBLE_ONLY = {"CohereForCausalLM", "Cohere2ForCausalLM"}
"""Served in compatibility mode, which folds their scale of logits: other tests hold them."""


@pytest.mark.offered(bool(SERVED))
@pytest.mark.parametrize("name", SERVED)
def test_a_served_name_is_exact_against_hugging_face(name):
    found = try_name(name)
    if found.outcome == "refused" and ("transformer_lens 3 " in found.reason):
        return  # a Bridge that is another model than Hugging Face's
    if name in COMPATIBLE_ONLY:
        assert "logits are scaled after" in found.reason, found
        return
    assert found.outcome == "exact", found
    expected = {"logits", "token", "component", "adjoint"}
    assert found.errors.keys() == expected - ({"adjoint"} if found.no_adjoint else set()), found
    assert not found.no_adjoint or name == "TransformerLensNative", found
