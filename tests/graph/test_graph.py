import pytest

from tensorlens_tl.graph.nodes import Edge, Node, resid_site

pytestmark = pytest.mark.algebra


@pytest.mark.parametrize(
    "text",
    [
        "embed",
        "pos_embed",
        "logits",
        "L3H7",
        "L12MLP",
        "L0N512",
        "L3.b_O",
        "L1.ln1.b",
        "b_U",
        "ln_final.b",
        "L3H7.v",
        "L3H7.q",
        "L3",
        "dim12",
        "order 3",
        "operator change",
        "L3.hook_z[user]",
    ],
)
def test_names_read_back(text):
    assert str(Node.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "H3", "Lx", "L3H", "L3h7", "L3H7.5x", "L3H7.z", "dim", "head 3"]
)
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match=r"is not a node\. Name .*'L3H7'"):
        Node.parse(text)


def test_site_names_are_the_hosts():
    assert resid_site(0, "mid") == "blocks.0.hook_resid_mid"


@pytest.mark.parametrize("text", ["L0H3→L2H1.v", "embed→L0MLP", "L1.b_O→logits", "L0MLP→L1H0.k"])
def test_edges_read_back(text):
    assert str(Edge.parse(text)) == text
    assert Edge.parse(text.replace("→", " -> ")) == Edge.parse(text)


@pytest.mark.parametrize(
    "text", ["L0H3", "L0H3→L2H1", "logits→L0MLP", "L0H3.v→logits", "L0H3→embed"]
)
def test_other_edges_are_refused(text):
    with pytest.raises(ValueError, match=r"is not an edge\. Name (a writer|both ends)"):
        Edge.parse(text)
