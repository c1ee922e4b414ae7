"""The k largest paths: against brute force, meet in the middle, the sum law; bounds; bad input."""

import itertools
import json
import math
import random
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from comparisons import assert_close
from models import (
    BRIDGE,
    CASES,
    HOOKED,
    ORACLE,
    PER_SHAPE,
    ROUNDING,
    SEQ,
    SHAPES,
    SHARED,
    HookedTransformer,
    build_bridge,
    build_hooked,
    lens_of,
    quiet,
    randn_like,
    tokens,
)

import tensorlens_tl
from tensorlens_tl.attribution.targets import resolve_target
from tensorlens_tl.graph.nodes import Node
from tensorlens_tl.lens.tensor_lens import TensorLens
from tensorlens_tl.paths import search
from tensorlens_tl.paths.bounds import (
    BLOCK,
    PathBound,
    StepParts,
    _symmetric,
    bounds_by_step,
    climb,
)
from tensorlens_tl.paths.energies import Rows
from tensorlens_tl.paths.results import Path, Paths

pytestmark = pytest.mark.algebra

every_case = pytest.mark.parametrize("case", PER_SHAPE, ids=str)
STORIES = SHARED / "stories260K"
EVERYTHING = 10**9


# --- The oracle: every path pushed forwards, one by one ------------------------------------------


def node_maps(step):
    """Every node of a step, by name: its map (norms included) and what its own constants write."""
    for branch in step.branches:
        for node in branch.body.nodes():
            part = branch.body.part(node)

            def linear(x, branch=branch, part=part):
                x = part.apply(x if branch.pre is None else branch.pre.apply(x))
                return x if branch.post is None else branch.post.apply(x)

            post = (lambda x: x) if branch.post is None else branch.post.apply
            own = {name: post(c) for name, c in part.constants().items()}
            if branch.pre is not None:
                for name in branch.pre.constants():
                    own[name] = post(part.apply(branch.pre.bias))
            yield node, linear, own


def written_outside(step):
    """The constants a step writes that no node holds."""
    found = {edit.name: edit.constant for edit in step.edits}
    for branch in step.branches:
        post = (lambda x: x) if branch.post is None else branch.post.apply
        name, b = branch.body.external
        if b is not None:
            found[name] = post(branch.body.frame.zeros(b.shape[0]) + b.detach())
        for edit in branch.body.edits.values():
            found[edit.name] = post(branch.body.map.constants()[edit.name])
        if branch.post is not None:
            found |= branch.post.constants()
    return found


def split(key, states, by_position):
    """{(node or position, …): states}, apart by the position a state is at."""
    if not by_position:
        return {key: states}
    here = torch.eye(states.shape[-2]).to(states)[:, :, None]
    return {(*key, p): states * here[p] for p in range(len(here))}


def pushed(steps, labels, states, by_position=False):
    """Every path below a site: {node sequence: (source labels, states [source, 1, pos, d])}."""
    frontier = {(): (labels, states)}
    for step in steps:
        grown = dict(frontier)
        for node, linear, own in node_maps(step):
            for nodes, (names, s) in frontier.items():
                for key, out in split((node,), linear(s), by_position).items():
                    grown[(*nodes, key)] = names, out
            for name, c in own.items():
                for (_, *pos), out in split((name,), c[None], by_position).items():
                    label, key = (name, *pos), ((node, *pos),)
                    names, s = grown.get(key, ([], c.new_zeros(0, *c.shape)))
                    grown[key] = [*names, label], torch.cat([s, out])
        for name, c in written_outside(step).items():
            for label, out in split((name,), c[None], by_position).items():
                names, s = grown[()]
                grown[()] = [*names, label], torch.cat([s, out])
        frontier = {key: (names, step.normed(s)) for key, (names, s) in grown.items()}
        for name, c in step.own.items():  # a norm of the residual itself
            for label, out in split((name,), c[None], by_position).items():
                names, s = frontier[()]
                frontier[()] = [*names, label], torch.cat([s, out])
    return frontier


def sources(capture, only=None):
    labels, states = [], []
    for name, x in capture.embeddings.items():
        for p in range(x.shape[1]):
            if only is None or (name == "embed" and p == only):
                labels.append((name, p))
                states.append(torch.zeros_like(x))
                states[-1][:, p] = x[:, p]
    return labels, torch.stack(states)


def brute_force(lens, target=None, pos=-1, only=None, by_position=False):
    """{(label, nodes): contribution} of every path, by pushing."""
    goal, operator = goal_of(lens, target, pos), lens.operator
    u = torch.zeros_like(lens.embedding)
    u[:, goal.query] = goal.covector
    found = {}
    for nodes, (names, s) in pushed(
        operator.steps, *sources(lens.capture, only), by_position
    ).items():
        values = (operator.ln_final.apply(s) * u).sum((1, 2, 3)).tolist()
        for label, value in zip(names, values, strict=True):
            if only is None or label[0] == "embed":
                assert (label, nodes) not in found
                found[label, nodes] = value
    if only is None:
        for name, c in operator.map.maps[-1].constants().items():
            at = (int(goal.query),) if by_position else ()
            found[(name, *at), ()] = float((u * c).sum())
        for name, share in goal.constants.items():
            found[(name,), ()] = float(share)
    return found


def goal_of(lens, target=None, pos=-1):
    return resolve_target(lens.capture, target, pos)


def key_of(path):
    nodes = tuple((node,) for node in path.nodes)
    if path.positions is not None:
        nodes = tuple((node, p) for node, p in zip(path.nodes, path.positions, strict=True))
    label = (str(path.start),) if path.pos is None else (str(path.start), path.pos)
    return label, nodes


def assert_largest(paths, brute, k, tol=ORACLE):
    """The k listed are k of the largest, each with its own contribution."""
    size = max(map(abs, brute.values()))
    keys = [key_of(path) for path in paths]
    assert len(set(keys)) == len(keys)
    for key, path in zip(keys, paths, strict=True):
        assert abs(path.contribution - brute[key]) <= tol * size, path
    ours = [abs(path.contribution) for path in paths]
    assert ours == sorted(ours, reverse=True)
    theirs = sorted((abs(c) for c in brute.values() if c), reverse=True)[:k]
    # A path that is 0 in exact arithmetic may be 0 pulled and 1e-18 pushed.
    theirs = theirs[: len(ours)] + [c for c in theirs[len(ours) :] if c > tol * size]
    assert len(ours) == len(theirs)
    if ours:
        assert_close(torch.tensor(ours), torch.tensor(theirs), tol)
    assert paths.exact


# --- Laws ----------------------------------------------------------------------------------------


@every_case
def test_all_paths_from_all_sources_sum_to_the_target(case):
    lens, target, pos = lens_of(case)[1], *((3, -1) if case.gated else (None, 2))
    paths = lens.paths(target, EVERYTHING, pos=pos, max_expansions=EVERYTHING)
    assert paths.exact and paths.largest_unexplored == 0
    total = sum(path.contribution for path in paths)
    size = sum(abs(path.contribution) for path in paths)
    tol = case.within("oracle")
    assert abs(total - paths.target_value) <= tol * size
    brute = brute_force(lens, target, pos)
    assert_largest(paths, brute, EVERYTHING)
    assert_largest(lens.paths(target, 10, pos=pos), brute, 10)


@every_case
def test_paths_from_a_token_sum_to_its_attribution(case):
    lens = lens_of(case)[0]
    a = lens.attribute(3)
    for token in (0, SEQ - 2):
        paths = lens.paths(3, EVERYTHING, from_token=token, max_expansions=EVERYTHING)
        assert {(str(path.start), path.pos) for path in paths} <= {("embed", token)}
        (own,) = (i for i, s in enumerate(a.sources) if (s.node, s.pos) == (Node("embed"), token))
        size = sum(abs(path.contribution) for path in paths)
        assert abs(sum(p.contribution for p in paths) - a.values[0, own]) <= ORACLE * size


def test_nothing_is_a_remainder():
    lens = lens_of(SHAPES[0])[0]
    blocks = tuple(
        replace(
            b,
            attn=replace(b.attn, mix=replace(b.attn.mix, pattern=torch.zeros_like(b.attn.pattern))),
        )
        for b in lens.capture.blocks
    )
    broken = TensorLens(replace(lens.capture, blocks=blocks)).paths(3, EVERYTHING)
    assert abs(sum(p.contribution for p in broken) - broken.target_value) > 1e-3
    assert not any(node.kind == "head" for path in broken for node in path.nodes)


# --- Brute force on random models ----------------------------------------------------------------


def random_model(rng):
    """A tiny random model of any family and shape."""
    layers, kv, heads = rng.choice([1, 2, 2, 3]), rng.choice([1, 2]), rng.choice([2, 4])
    if HookedTransformer is not None:
        name = rng.choice([n for n in HOOKED if n != "mistral"])
        config = {
            **HOOKED[name],
            "n_layers": layers,
            "n_heads": heads,
            "d_head": rng.choice([4, 8]),
        }
        config |= {"d_model": rng.choice([6, 12, 16])}
        if "n_key_value_heads" in config:
            config["n_key_value_heads"] = kv
        if "rotary_dim" in config:
            config["rotary_dim"] = 4
        if config.get("attn_types"):
            config["attn_types"] = ["global", "local", "global"][:layers]
        if config.get("d_mlp", 1):
            config["d_mlp"] = rng.choice([3, 10])
        return name, build_hooked(config, torch.float64)
    name = rng.choice(list(BRIDGE))
    class_name, config = BRIDGE[name]
    config = dict(config)
    if name == "gpt2":
        config |= {"n_layer": layers, "n_embd": 16, "n_head": heads}
    else:
        config |= {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": 16}
        if "num_key_value_heads" in config:
            config["num_key_value_heads"] = kv
        if name == "gemma2":
            config["layer_types"] = ["sliding_attention", "full_attention"] * 2
            config["layer_types"] = config["layer_types"][:layers]
    return name, build_bridge(class_name, config, torch.float64)


@pytest.mark.parametrize("seed", range(20))
def test_k_best_equal_brute_force(seed):
    rng = random.Random(seed)
    with quiet(), torch.no_grad():
        _, model = random_model(rng)
        seq = rng.randint(2, 5)
        gate = rng.choice(["gate", "up", "half"])
        _, lens = tensorlens_tl.capture(model, tokens(1, seq, seed), gate=gate)
    k, pos, only = rng.choice([1, 5, 30]), rng.choice([-1, seq // 2]), rng.choice([None, 0])
    paths = lens.paths(3, k, pos=pos, from_token=only)
    brute = brute_force(lens, 3, pos, only)
    assert_largest(paths, brute, k)
    listed = {key_of(path) for path in paths}
    others = max((abs(c) for key, c in brute.items() if key not in listed), default=0)
    size = max(map(abs, brute.values()))
    assert others <= paths.largest_unexplored + ORACLE * size
    if len(paths) == k:
        assert paths.largest_unexplored <= abs(paths[-1].contribution)
    # As good with the energies truncated to a few directions.
    width, sites = lens.embedding.shape[-1], len(lens.operator.steps) + 1
    limit = 8 * seq * width * (5 * width + 2 * sites)
    assert [key_of(p) for p in lens.paths(3, k, pos=pos, from_token=only, memory_limit=limit)] == [
        key_of(p) for p in paths
    ]


@pytest.mark.parametrize("seed", range(6))
def test_k_best_by_position_equal_brute_force(seed):
    rng = random.Random(seed)
    with quiet(), torch.no_grad():
        _, model = random_model(rng)
        while len(model.blocks) > 2:
            _, model = random_model(rng)
        _, lens = tensorlens_tl.capture(model, tokens(1, 3, seed))
    only, pos = rng.choice([None, 1]), rng.choice([-1, 1])
    brute = brute_force(lens, 3, pos, only, by_position=True)
    for k in (7, EVERYTHING):
        paths = lens.paths(3, k, pos=pos, from_token=only, by_position=True, max_expansions=10**6)
        assert_largest(paths, brute, k)
    summed = {}
    for path in paths:  # positions inside, summed, are the paths without positions
        label, nodes = key_of(path)
        if str(path.start) not in ("embed", "pos_embed"):
            label = label[:1]
        key = label, tuple((node,) for node, _ in nodes)
        summed[key] = summed.get(key, 0) + path.contribution
    assert_largest(lens.paths(3, 20, pos=pos, from_token=only), summed, 20)


def test_the_random_models_were_of_many_kinds():
    with quiet():
        names = {random_model(random.Random(seed))[0] for seed in range(60)}
    assert len(names) >= 5


# --- A trained model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories():
    if not STORIES.is_dir():
        pytest.skip("needs the shared model and texts")
    from tensorlens_tl.hosts import load_model

    with quiet():
        return load_model(str(STORIES), "bridge" if HookedTransformer is None else "hooked")


def test_hundred_best_of_two_tokens_by_meeting_in_the_middle(stories):
    with quiet(), torch.no_grad():
        _, lens = tensorlens_tl.capture(stories, torch.tensor([[403, 407]]), dtype=torch.float64)
    steps, operator = lens.operator.steps, lens.operator
    goal = goal_of(lens)
    u = torch.zeros_like(lens.embedding)
    u[:, goal.query] = goal.covector
    below = pushed(steps[:5], *sources(lens.capture))
    rows = [  # the host's biases are zeros
        (label, nodes, s[i].flatten())
        for nodes, (names, s) in below.items()
        for i, label in enumerate(names)
        if label[0] == "embed" or s[i].any()
    ]
    states = torch.stack([s for *_, s in rows])
    above = {(): operator.ln_final.apply_t(u)}
    for step in reversed(steps[5:]):
        for branch, (nodes, v) in itertools.product(step.branches, list(above.items())):
            v = v if branch.post is None else branch.post.apply_t(v)
            for node in branch.body.nodes():
                w = branch.body.part(node).apply_t(v)
                above[((node,), *nodes)] = w if branch.pre is None else branch.pre.apply_t(w)
    upper = list(above)
    values = torch.stack([v.flatten() for v in above.values()]) @ states.T
    assert values.numel() == 2 * 9**5 * 2**5 == 3_779_136  # two tokens
    total = values.sum()
    assert abs(total - goal.value) <= 1e-6 * values.abs().sum()  # the host ran in float32
    top = values.abs().flatten().topk(100).indices.tolist()
    best = {}
    for i in top:
        row, column = divmod(i, len(rows))
        label, nodes, _ = rows[column]
        best[label, nodes + upper[row]] = float(values[row, column])
    assert_largest(lens.paths(None, 100), best, 100)


TEXT = (
    "Lily and Ben were playing in the garden with a ball. Ben threw the ball to Lily. Lily was so "
    "happy that she"
)


def test_expansions_on_a_trained_model(stories):
    with quiet(), torch.no_grad():
        _, lens = tensorlens_tl.capture(stories, TEXT)
    assert len(lens.tokens[0]) == 37
    for token in (None, 0, 8, 11, 20, 36):  # all tokens: benchmarks/paths.py
        paths = lens.paths(k=10, from_token=token)
        assert len(paths) == 10 and paths.exact and paths.expansions <= 1_000
    assert lens.paths(k=10, by_position=True).expansions <= 1_000
    limit = 8 * 37 * 64 * (5 * 64 + 11 * 8)  # eight directions of 64
    cheaper = lens.paths(k=10, memory_limit=limit)
    assert [p.name for p in cheaper] == [p.name for p in lens.paths(k=10)]


# --- Bounds, budgets, edited runs ----------------------------------------------------------------


@pytest.mark.parametrize("run", ["double norms", "edited"])
def test_energies_are_upper_bounds_of_all_states(run):
    gemma = CASES.get("hooked-gemma2") or CASES["bridge-gemma2"]
    lens = edited() if run == "edited" else lens_of(gemma)[0]
    steps, capture = lens.operator.steps, lens.capture
    stages = [StepParts.of(step) for step in steps]
    for by_position in (False, True):
        grown = climb(stages, capture.embeddings, True, by_position)
        for site, (whole, _) in zip(range(3 if by_position else 5), grown, strict=False):
            energy = PathBound.of(whole, None)
            below = pushed(steps[:site], *sources(capture), by_position)
            states = torch.cat([s[:, 0] for _, s in below.values()])
            C = torch.einsum("spd,spe->pde", states, states)
            assert torch.linalg.eigvalsh(energy.whole - C).min() >= 0
            if by_position:
                assert_close(energy.whole, C, ROUNDING)
            for rank in (1, 4, 16):
                sketch = PathBound.of(energy.whole, rank)
                v = randn_like(states[:9], site)
                assert (sketch.energies(v) >= energy.energies(v)).all()
                bound = sketch.U @ sketch.U.mT + sketch.floor[:, None, None] * torch.eye(32)
                assert torch.linalg.eigvalsh(bound - energy.whole).min() >= 0


def test_a_budget_stops_the_search_and_says_so():
    lens = lens_of(SHAPES[0])[0]
    brute = brute_force(lens, 3)
    exact = lens.paths(3, 100)
    for budget in (1, 5, 20):
        paths = lens.paths(3, 100, max_expansions=budget)
        assert paths.expansions <= budget < exact.expansions and not paths.exact
        listed = {key_of(path) for path in paths}
        others = max(abs(c) for key, c in brute.items() if key not in listed)
        assert others <= paths.largest_unexplored
        assert all(abs(p.contribution - brute[key_of(p)]) <= ORACLE for p in paths)
        assert "found before the budget" in repr(paths)


def test_an_interrupted_search_gives_the_beams_paths(monkeypatch):
    lens = lens_of(SHAPES[0])[0]
    brute = brute_force(lens, 3)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "bounds_by_step", interrupt)
    paths = lens.paths(3, 5)
    assert len(paths) == 5 and not paths.exact and paths.largest_unexplored == math.inf
    assert all(abs(p.contribution - brute[key_of(p)]) <= ORACLE for p in paths)
    assert json.loads(paths.to_json())["largest_unexplored"] is None


def test_bounds_serve_further_targets_of_a_run(monkeypatch):
    lens = TensorLens(lens_of(SHAPES[0])[0].capture)
    built, build = [], search.bounds_by_step
    monkeypatch.setattr(search, "bounds_by_step", lambda *a: built.append(1) or build(*a))
    for target in (3, 4, None):
        assert_largest(lens.paths(target, 10), brute_force(lens, target), 10)
    assert len(built) == 1
    lens.paths(3, 10, from_token=1)  # other sources
    assert len(built) == 2


@pytest.mark.parametrize("by_position", [False, True])
def test_bounds_hold_in_single_precision(by_position):
    """Every way's energy covers the states that come that way, as they are in double precision."""
    case = CASES.get("hooked-gemma2") or CASES["bridge-gemma2"]
    ids = tokens(1)
    with quiet(), torch.no_grad():
        fine, coarse = (
            tensorlens_tl.capture(case.model(), ids, dtype=dtype)[1]
            for dtype in (torch.float64, torch.float32)
        )
    exact, bounds = (
        bounds_by_step(
            [StepParts.of(step) for step in lens.operator.steps],
            *(lens.capture.embeddings, True, by_position, 2**30),
        )
        for lens in (fine, coarse)
    )
    v = randn_like(torch.empty(7, *coarse.embedding.shape[1:]), 3).float()
    e, bound = exact[1].energies(v.double()), bounds[1].energies(v)
    assert (bound.double() >= e).all()
    for fine_step, step in zip(reversed(exact[0]), reversed(bounds[0]), strict=True):
        e, bound = fine_step.past_norm(v.double(), e), step.past_norm(v, bound)
        ways, bounded = fine_step.ways(v.double(), e), step.ways(v, bound)
        for way, most in zip(ways, bounded, strict=True):
            assert (most.double() >= way * (1 - 1e-6)).all()
            assert (most.double() <= way + 1e-3 * e).all()
        e, bound = ways[0], bounded[0]  # straight on, the same covectors


@cache
def edited():
    """A run with negative patterns, and edits of a head's output and of the residual."""
    case = CASES.get("hooked-gpt2") or CASES["native-gpt2"]
    model = case.model()
    signs = torch.ones(1, 4, 1, SEQ).double()
    signs[:, ::2, :, ::2] = -2

    def shift(t, hook):
        return t + 0.1 * torch.arange(t.numel()).reshape(t.shape).sin()

    edits = [
        ("blocks.0.attn.hook_pattern", lambda t, hook: t * signs),
        ("blocks.1.attn.hook_pattern", lambda t, hook: t * signs),
        ("blocks.0.attn.hook_z", shift),
        ("blocks.1.hook_resid_pre", shift),
    ]
    with quiet(), torch.no_grad(), model.hooks(fwd_hooks=edits):
        return tensorlens_tl.capture(model, tokens(1))[1]


def test_runs_edited_by_the_users_own_hooks():
    lens = edited()
    brute = brute_force(lens, 3)
    assert len({label[0] for label, _ in brute if "user" in label[0]}) == 2
    assert_largest(lens.paths(3, 25), brute, 25)
    paths = lens.paths(3, EVERYTHING)
    assert_largest(paths, brute, EVERYTHING)
    size = sum(map(abs, brute.values()))
    assert abs(sum(path.contribution for path in paths) - paths.target_value) <= ORACLE * size


# --- What a user sees ----------------------------------------------------------------------------


def test_results():
    lens = lens_of(SHAPES[0])[0]
    paths = lens.paths(3, 5, versus=4)
    assert isinstance(paths, Paths) and len(paths) == 5 and paths.target == "'#3' − '#4'"
    assert len(paths[:2]) == 2 and paths[0] is next(iter(paths)) and paths[0] in paths
    lines = repr(paths).splitlines()
    assert len(lines) == 6 and lines[0].startswith("Paths to '#3' − '#4' = ")
    assert "the 5 largest" in lines[0] and lines[1].endswith(f"  {paths[0].name}")
    frame = paths.to_dataframe()
    assert list(frame.value) == [path.contribution for path in paths]
    assert list(frame.path) == [path.name for path in paths]
    data = json.loads(paths.to_json())
    assert data["exact"] is True and data["convention"] == {"gate": "gate", "first_token": None}
    assert [p["value"] for p in data["paths"]] == [path.contribution for path in paths]
    assert data["paths"][0]["nodes"] == [str(node) for node in paths[0].nodes]
    without = lens.paths(3, EVERYTHING, constants=False)
    assert {str(path.start) for path in without} <= {"embed", "pos_embed"}


def test_how_a_path_reads():
    nodes = (Node("head", 2, 1), Node("mlp", 3))
    path = Path(Node("embed"), 3, nodes, None, 0.42, '"Mary"@3')
    assert repr(path) == '"Mary"@3 → L2H1 → L3MLP → logits  +0.42'
    assert replace(path, positions=(5, 5)).name == '"Mary"@3 → L2H1@5 → L3MLP@5 → logits'
    bias = Path(Node.parse("L0.b_O"), None, (), None, -2.0, "L0.b_O")
    assert repr(bias) == "L0.b_O → logits  -2"


def test_by_hand():
    """The two-token model of test_attribution: the last logit's paths from token a.

    Straight to the logits: 0 (a is at position 0). Through the head: 1/4·(1 + 2)·(2, 0) = (1.5, 0)
    is added at position 1, and u = (1, 10) reads 1.5. Through head and MLP: W_in = (0, 1)ᵀ reads 0.
    From token b, (3, 4): straight 43; the head adds 3/4·7·2 = 10.5 along (1, 0): 10.5; the MLP
    reads 4 and writes (4, 4): 44. b_V: 2; b_in: −11; b_O: 10, and 1·(1, 1)·u = 11 through the MLP;
    b_out 30; b_U 5. Sum: 1.5 + 43 + 10.5 + 44 + 2 − 11 + 10 + 11 + 30 + 5 = 146.
    """
    from test_attribution import hand_made

    paths = hand_made().paths(0, 100)
    assert {path.name: path.contribution for path in paths} == {
        '"a"@0 → L0H0 → logits': 1.5,
        '"b"@1 → logits': 43,
        '"b"@1 → L0H0 → logits': 10.5,
        '"b"@1 → L0MLP → logits': 44,
        "L0.b_V → L0H0 → logits": 2,
        "L0.b_in → L0MLP → logits": -11,
        "L0.b_O → logits": 10,
        "L0.b_O → L0MLP → logits": 11,
        "L0.b_out → logits": 30,
        "b_U → logits": 5,
    }


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 0}, "k=0 is not an integer ≥ 1"),
        ({"k": 2.5}, "k=2.5 is not an integer ≥ 1"),
        ({"k": True}, "k=True is not an integer ≥ 1"),
        ({"max_expansions": 0}, "max_expansions=0 is not an integer ≥ 1"),
        ({"from_token": SEQ}, rf"Position {SEQ} is outside prompt 0, .* Pass -{SEQ} to {SEQ - 1}"),
        ({"from_token": "Mary"}, "Position .Mary. is not an integer"),
        ({"pos": 99}, "Position 99 is outside prompt 0"),
        ({"memory_limit": 1000}, "at least .* GiB for 7 positions.*Raise memory_limit, or take a"),
        ({"target": -1}, "-1"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(kwargs, message):
    with pytest.raises(ValueError, match=message):
        lens_of(SHAPES[0])[0].paths(**kwargs)


def test_several_prompts_are_refused():
    with pytest.raises(
        ValueError, match=r"needs one prompt, but the lens has 2. Take one with lens\[i\]"
    ):
        lens_of(SHAPES[0]).paths(3)


def test_symmetric_products_and_packed_rows_equal_their_slow_twins():
    draw = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    width = 2 * BLOCK + 7  # more than one block, and a rest
    left = draw(3, 5, width)
    C = left.mT @ left
    assert_close(_symmetric(left, left), C, 1e-12)
    v = draw(4, 3, width)
    v[0, 1:], v[1, 0], v[2] = 0, 0, 0
    rows = Rows.of(v)
    wanted = torch.einsum("npd,pde,npe->np", v, C, v)
    assert_close(rows.put(rows.forms(C)), wanted, 1e-12)
    M = draw(3, width, 6)
    done = rows.times(M)
    assert_close(done._spread(done.x).transpose(0, 1), torch.einsum("npd,pde->npe", v, M), 1e-12)
    A = draw(3, 3)
    assert_close(rows.mixed(A), torch.einsum("qk,nqd->knd", A, v), 1e-12)
