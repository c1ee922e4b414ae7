import pytest

from tensorlens_tl.graph import Node, resid_site


@pytest.mark.parametrize(
    "text", ["embed", "pos_embed", "logits", "L3H7", "L12MLP", "L0N512", "L3.b_O", "L1.ln1.b", "b_U", "ln_final.b"]
)  # fmt: skip
def test_names_read_back(text):
    assert str(Node.parse(text)) == text


@pytest.mark.parametrize("text", ["", "H3", "L3", "L3H", "L3h7", "L3H7.5x", "head 3"])
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match=r"is no node; expected.*'L3H7'"):
        Node.parse(text)


def test_site_names_are_the_hosts():
    assert resid_site(0, "mid") == "blocks.0.hook_resid_mid"
