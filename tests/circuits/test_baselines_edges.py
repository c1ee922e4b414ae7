"""Earlier rankings of edges, against slopes of the edge-patched run; orders of random circuits."""

import pytest
import torch
from comparisons import assert_close
from models import ORACLE, PER_SHAPE, SHAPES, quiet, tokens
from test_interventions import CLEAN, CORRUPTED, ONE_OF_EACH, universe_of

from tensorlens_tl import Edge, Node
from tensorlens_tl.circuits.ablation import faithfulness_curve
from tensorlens_tl.circuits.edge_averages import first_edges
from tensorlens_tl.circuits.edge_baselines import EDGE_METHODS, random_scores, score_edges
from tensorlens_tl.passes.edge_patching import edge_model

GOAL = {"target": 3, "versus": [4, 5, 6]}


def measure(run):
    logits = run.logits[:, :, -1]
    return (logits[..., 3] - logits[:, torch.arange(3), torch.tensor([4, 5, 6])]).sum(-1)


@pytest.mark.parametrize(
    "case", [c for c in ONE_OF_EACH if c in PER_SHAPE or "compat" in c.name], ids=str
)
def test_eap_is_the_slope_at_the_clean_run(case):
    """d m / d keep[edge] at the full circuit: central differences against one gradient for all."""
    model, h = case.model(), 1e-3 if case.float32_norms else 1e-5
    with quiet():
        scores = score_edges(model, CLEAN, CORRUPTED, **GOAL)
    with quiet(), torch.no_grad(), edge_model(model) as edged:
        universe, other = edged.universe, edged.run(CORRUPTED).writes[0]
        edges = universe.edges[::3]
        keep = torch.ones(2, len(edges), len(universe.readers), len(universe.writers)).double()
        for i, edge in enumerate(edges):
            keep[(0, i, *universe.place(edge))] += h
            keep[(1, i, *universe.place(edge))] -= h
        up, down = (measure(edged.run(CLEAN, part, other)) for part in keep)
    slopes = (up - down) / (2 * h) / 3  # the mean over prompts
    ours = torch.tensor([scores[edge] for edge in edges]).double()
    assert set(scores) == set(universe.edges) and slopes.abs().max() > 1e-2
    assert_close(ours, slopes, case.within("slope"))


@pytest.mark.parametrize("case", ONE_OF_EACH[:2], ids=str)
def test_eap_ig_is_the_mean_slope_along_the_embeddings(case):
    """With the writers' difference of the two runs as direction, at x′ + k/m (x − x′)."""
    model, h, steps = case.model(), 1e-3 if case.float32_norms else 1e-5, 3
    with quiet():
        scores = score_edges(model, CLEAN, CORRUPTED, "eap_ig", steps=steps, **GOAL)
        one = score_edges(model, CLEAN, CORRUPTED, "eap_ig", steps=1, **GOAL)
        plain = score_edges(model, CLEAN, CORRUPTED, **GOAL)
    slopes = []
    with quiet(), torch.no_grad(), edge_model(model) as edged:
        universe = edged.universe
        a, b = (edged.run(ids).writes[0] for ids in (CLEAN, CORRUPTED))
        edges = universe.edges[5::17]
        for edge in edges:
            nudge = torch.zeros(len(universe.readers), len(universe.writers)).double()
            nudge[universe.place(edge)] = h
            values = [
                measure(
                    edged.run(
                        CLEAN,
                        nudge=sign * nudge,
                        direction=a - b,
                        embeddings=b[0] + k / steps * (a - b)[0],
                    )
                )
                for k in range(1, steps + 1)
                for sign in (1, -1)
            ]
            slopes.append(sum(values[::2]) / (2 * h) - sum(values[1::2]) / (2 * h))
    ours = torch.tensor([scores[edge] for edge in edges]).double()
    assert_close(ours, torch.cat(slopes) / steps / 3, case.within("slope"))
    assert one == pytest.approx(plain, abs=case.within("run"))
    assert max(abs(scores[e] - plain[e]) for e in scores) > 1e-2


def test_scores_are_means_whatever_the_batch_and_leave_no_gradient():
    model = SHAPES[0].model()
    with quiet():
        whole = score_edges(model, CLEAN, CORRUPTED, target=3)
        each = [
            score_edges(model, CLEAN[i : i + 1], CORRUPTED[i : i + 1], target=3) for i in range(3)
        ]
        with torch.no_grad():
            small = score_edges(model, list(CLEAN), list(CORRUPTED), target=3, batch_size=1)
    for edge, score in whole.items():
        assert score == pytest.approx(sum(one[edge] for one in each) / 3, abs=ORACLE)
        assert score == pytest.approx(small[edge], abs=ORACLE)
    assert all(p.grad is None for p in model.parameters())


def test_direct_effects_rank_by_the_weaker_end():
    model = SHAPES[0].model()
    with quiet():
        eap = score_edges(model, CLEAN, CORRUPTED, target=3)
        direct = score_edges(model, CLEAN, CORRUPTED, "direct", target=3)
    logits = Node("logits")
    for name in ("L0H1→L1H2.k", "L0MLP→L1MLP", "L0H3→logits"):
        edge = Edge.parse(name)
        ends = (
            [edge.src]
            if edge.dest == logits
            else [edge.src, Node(edge.dest.kind, edge.dest.layer, edge.dest.index)]
        )
        assert direct[edge] == min(abs(eap[Edge(end, logits)]) for end in ends)


@pytest.mark.parametrize("case", ONE_OF_EACH[:3], ids=str)
def test_random_circuits_are_connected(case):
    """Every edge lies on a path from the input to the logits, at sizes of whole walks."""
    universe = universe_of(case.model())
    scores = random_scores(universe, seed=3)
    assert scores == random_scores(universe, seed=3) != random_scores(universe, seed=4)
    for n in range(1, len(universe.edges) // 2):
        circuit = first_edges(universe, scores, n)
        assert len(circuit) == n
        sources = {edge.src for edge in circuit}
        for edge in circuit:  # whatever it is read by was reached from the logits
            node = Node(edge.dest.kind, edge.dest.layer, edge.dest.index)
            assert edge.dest == Node("logits") or node in sources


def test_the_full_ranking_ends_at_the_full_model():
    model = SHAPES[0].model()
    with quiet():
        for method in EDGE_METHODS:
            scores = score_edges(model, CLEAN, CORRUPTED, method, target=3)
            curve = faithfulness_curve(model, CLEAN, scores, CORRUPTED, target=3, sizes=(0.1, 1.0))
            assert float(curve.shares[1]) == pytest.approx(1, abs=ORACLE)


def test_bad_calls_are_refused():
    model = SHAPES[0].model()
    with quiet():
        with pytest.raises(
            ValueError, match=r"method='ig' does not exist. Use one of eap, eap_ig, direct, random"
        ):
            score_edges(model, CLEAN, CORRUPTED, "ig")
        with pytest.raises(ValueError, match="steps=0 is not an integer ≥ 1"):
            score_edges(model, CLEAN, CORRUPTED, "eap_ig", steps=0)
        with pytest.raises(ValueError, match="Prompt 0 has 7 tokens, its corrupted prompt 6"):
            score_edges(model, CLEAN, tokens(3, 6))
        with pytest.raises(ValueError, match="corrupted=None, but this method compares two runs"):
            score_edges(model, CLEAN, None)
        with pytest.raises(ValueError, match="metric returned numbers without a gradient"):
            score_edges(model, CLEAN, CORRUPTED, metric=lambda logits, index: logits[:, 0].detach())
