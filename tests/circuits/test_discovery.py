"""Circuits of many prompts: means, batches, interruptions, files."""

import json
from collections import UserList

import pytest
import torch
from comparisons import assert_close
from models import PER_SHAPE, ROUNDING, SHAPES, quiet

import tensorlens_tl
from tensorlens_tl import Circuit, demo
from tensorlens_tl.circuits import discovery

NAMES = ("Mary", "John", "Tom", "Kate")
TEXT = "When {a} and {b} went to the {c}, {d} gave a drink to"


def task(n=6):
    """Prompts of two lengths, their corrupted ones, and the names in question."""
    rows = []
    for i in range(n):
        a, b = NAMES[i % 4], NAMES[(i + 1 + i // 4) % 4]
        c = "store" if i % 3 else "park"
        rows.append((TEXT.format(a=a, b=b, c=c, d=b), TEXT.format(a=a, b=b, c=c, d=a), a, b))
    return tuple(map(list, zip(*rows, strict=True)))


@pytest.fixture(scope="module")
def model():
    return demo.load_model()


def one_by_one(model, rows, **kwargs):
    """Mean scores, every prompt by itself and in full."""
    total: dict = {}
    for clean, corrupted, a, b in zip(*rows, strict=True):
        with torch.no_grad():
            _, lens = tensorlens_tl.capture(model, clean)
            other = None if corrupted is None else tensorlens_tl.capture(model, corrupted)[1]
        circuit = lens.discover(a, versus=b, n_edges=1, corrupted=other, **kwargs)
        for edge, score in circuit.scores.items():
            total[edge] = total.get(edge, 0.0) + score / len(rows[0])
    return total


every_case = pytest.mark.parametrize("case", PER_SHAPE, ids=str)


def vector(scores):
    return torch.tensor(list(scores.values()), dtype=torch.float64)


@pytest.mark.parametrize(("at", "batch_size"), [("clean", 4), ("corrupted", 1), (None, 4)])
def test_scores_are_means_over_prompts(model, at, batch_size):
    rows = task()
    corrupted = None if at is None else rows[1]
    kwargs = {"at": at} if at else {}
    found = tensorlens_tl.discover(
        model, rows[0], corrupted, rows[2], rows[3], n_edges=30, batch_size=batch_size, **kwargs
    )
    expected = one_by_one(model, (rows[0], corrupted or [None] * 6, *rows[2:]), **kwargs)
    assert tuple(found.scores) == tuple(expected)
    assert_close(vector(found.scores), vector(expected), 1e-5)
    assert found.n_prompts == 6 and found.corrupted == bool(at) and found.is_connected
    pairs = list(dict.fromkeys(f"{a!r} − {b!r}" for a, b in zip(*rows[2:], strict=True)))
    assert found.target.startswith(", ".join(pairs[:3])) and len(found) <= 30
    assert found.target.endswith("(each prompt's own)") and found.target in repr(found)
    assert "mean of 6 prompts" in repr(found)
    with torch.no_grad():
        tensorlens_tl.capture(model, rows[0][0])[1].circuit(found)  # of the same model


@every_case
def test_ids_of_several_lengths_own_predictions_and_one_target_for_all(case):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 50, (n,), generator=generator) for n in (5, 7, 7, 6)]
    lenses = []
    with quiet(), torch.no_grad():
        lenses = [tensorlens_tl.capture(case.model(), p)[1] for p in ids]
        own = tensorlens_tl.discover(case.model(), ids, n_edges=20, pos=-2)
        one = tensorlens_tl.discover(case.model(), ids, None, 3, 4, n_edges=20, qk=False)
    for found, args, kwargs in ((own, (None, None, -2), {}), (one, (3, 4), {"qk": False})):
        parts = [vector(lens.discover(*args, n_edges=1, **kwargs).scores) for lens in lenses]
        assert_close(vector(found.scores), sum(parts) / 4, 10 * case.tol())
    assert own.target == "each prompt's own prediction"
    assert one.target == "'#3' − '#4'"


def test_a_corrupted_run_is_asked_about_the_clean_ones_prediction():
    case, generator = SHAPES[0], torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (2, 3, 7), generator=generator)
    with quiet(), torch.no_grad():
        found = tensorlens_tl.discover(
            case.model(), list(ids[0]), list(ids[1]), n_edges=20, at="corrupted"
        )
        parts = []
        for a, b in zip(*ids, strict=True):
            clean, other = (tensorlens_tl.capture(case.model(), p)[1] for p in (a, b))
            parts.append(clean.discover(n_edges=1, corrupted=other, at="corrupted"))
    assert_close(vector(found.scores), sum(vector(c.scores) for c in parts) / 3, ROUNDING)


def test_targets_that_are_directions_and_prompts_without_a_foil(model):
    rows = task(4)
    token = model.to_single_token("Tom")
    direction = torch.zeros(model.cfg.d_vocab)
    direction[token] = 1.0
    args = {"n_edges": 30, "batch_size": 4}
    named = tensorlens_tl.discover(model, *rows[:2], ["Tom"] * 4, ["Mary", None] * 2, **args)
    same = tensorlens_tl.discover(
        model, *rows[:2], [direction, token, "Tom", direction], ["Mary", None] * 2, **args
    )
    assert_close(vector(same.scores), vector(named.scores), 1e-5)
    halves = [
        tensorlens_tl.discover(model, *(part[i::2] for part in rows[:2]), "Tom", foil, **args)
        for i, foil in enumerate(["Mary", None])
    ]
    mean = sum(vector(half.scores) for half in halves) / 2
    assert_close(vector(named.scores), mean, 1e-5)


def test_a_sample_is_drawn_by_its_seed(model):
    rows = task(8)
    args = (model, *rows)
    a = tensorlens_tl.discover(*args, n_edges=30, sample=3, seed=1)
    assert a == tensorlens_tl.discover(*args, n_edges=30, sample=3, seed=1)
    others = [tensorlens_tl.discover(*args, n_edges=30, sample=3, seed=s).scores for s in (2, 3)]
    assert a.n_prompts == 3 and any(scores != a.scores for scores in others)


@pytest.mark.parametrize("stop", [2])
def test_an_interrupted_search_goes_on_where_it_was(model, tmp_path, monkeypatch, stop):
    rows, path = task(7), tmp_path / "circuit.json"
    args = {"n_edges": 30, "batch_size": 2}
    whole = tensorlens_tl.discover(model, *rows, **args)
    calls, run = [], discovery._Work.sums

    def interrupted(self, model, start, stop_):
        calls.append(start)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return run(self, model, start, stop_)

    monkeypatch.setattr(discovery._Work, "sums", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tensorlens_tl.discover(model, *rows, path=path, **args)
    partial = Circuit.from_json(path.read_text())
    assert partial.n_prompts == 2 * stop and partial.is_connected and len(partial.scores) > 400
    first = tuple(part[: 2 * stop] for part in rows)
    monkeypatch.setattr(discovery._Work, "sums", run)
    assert partial == tensorlens_tl.discover(model, *first, **args)
    calls.clear()
    monkeypatch.setattr(discovery._Work, "sums", lambda *a: calls.append(a[2]) or run(*a))
    assert tensorlens_tl.discover(model, *rows, path=path, **args) == whole  # to the bit
    assert calls == list(range(2 * stop, 7, 2))
    assert Circuit.from_json(path.read_text()) == whole
    calls.clear()
    small = tensorlens_tl.discover(model, *rows, path=path, n_edges=10)  # nothing left to run
    assert calls == [] and small == whole.resized(n_edges=10)
    assert [p.name for p in tmp_path.iterdir()] == ["circuit.json"]


def test_the_file_is_written_along_the_way(model, tmp_path, monkeypatch):
    rows, path, seen = task(4), tmp_path / "circuit.json", []
    run = discovery._Work.sums
    monkeypatch.setattr(discovery, "WRITE_EVERY", 0.0)

    def look(self, model, start, stop):
        seen.append(json.loads(path.read_text())["progress"]["done"] if path.exists() else 0)
        return run(self, model, start, stop)

    monkeypatch.setattr(discovery._Work, "sums", look)
    tensorlens_tl.discover(model, *rows, n_edges=5, batch_size=1, path=path)
    assert seen == [0, 1, 2, 3]


def test_progress_and_the_model_as_it_was(model, capsys, monkeypatch):
    monkeypatch.setattr("tensorlens_tl.checks.PROGRESS_AFTER", 0)
    rows = task(3)
    before = {n: p.clone() for n, p in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()], model.training, torch.is_grad_enabled()
    tensorlens_tl.discover(model, *rows, n_edges=5, batch_size=2)
    shown = capsys.readouterr().err
    assert "prompts:" in shown and "/3" in shown
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    now = [p.requires_grad for p in model.parameters()], model.training, torch.is_grad_enabled()
    assert now == flags and not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.wrong_types  # an array is no sequence
def test_ids_as_the_host_gives_them(model):
    """Ids [1, pos] are one prompt each, and targets may be a tensor or an array of ids."""
    *texts, right, wrong = task(3)
    ids = [[model.to_tokens(text) for text in part] for part in texts]
    a, b = (torch.tensor([int(model.to_single_token(x)) for x in part]) for part in (right, wrong))
    expected = tensorlens_tl.discover(model, *texts, right, wrong, n_edges=9)
    for goals in ((a, b), (a.numpy(), b.numpy())):
        found = tensorlens_tl.discover(model, *ids, *goals, n_edges=9)
        assert found.edges == expected.edges and found.target == expected.target
        assert_close(vector(found.scores), vector(expected.scores), 1e-5)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_padded_ids_with_their_mask_are_the_prompts(model, batch_size):
    texts = [
        "The capital of France is",
        "When Mary and John went to the store, John gave a drink to",
    ]
    ids = model.to_tokens(texts)
    expected = tensorlens_tl.discover(model, texts, n_edges=9)
    args = {"n_edges": 9, "batch_size": batch_size, "attention_mask": ids != 2}
    found = tensorlens_tl.discover(model, list(ids), **args)
    assert found.edges == expected.edges
    assert_close(vector(found.scores), vector(expected.scores), 1e-5)


@pytest.mark.wrong_types
def test_refusals(model, tmp_path):
    rows, path = task(3), tmp_path / "circuit.json"
    for args, kwargs, match in (
        (("one prompt",), {}, "prompts='one prompt' is not a non-empty list. Put"),
        (([],), {}, r"prompts=\[\] is not a non-empty list"),
        ((rows[0], rows[1][:2]), {}, "3 prompts but 2 corrupted prompts"),
        ((rows[0], rows[1][0]), {}, "corrupted='.*' is not a non-empty list"),
        ((rows[0], None, ["Mary"]), {}, "target has 1 entries for 3 prompts"),
        (rows, {"n_edges": 10**6}, "n_edges=1000000 is not an integer from 1 to 479"),
        (rows, {"n_edges": None}, "gives neither n_edges= nor threshold="),
        (rows, {"selection": "luck"}, "selection='luck' does not exist. Use one of greedy"),
        (rows, {"batch_size": 0}, "batch_size=0 is not an integer ≥ 1"),
        (
            rows,
            {"targets": "Mary"},
            r"There is no argument targets= of discover. Did you mean target=\?",
        ),
        (
            (model.to_tokens(["The capital", *rows[0]]),),
            {},
            "prompt 0 ends in the padding token",
        ),
        (
            ([model.to_tokens(rows[0])],),
            {},
            r"prompts\[0\] has ids of shape .*, which are 3 prompts",
        ),
        (rows, {"sample": 4}, "sample=4 is more than the 3 prompts"),
        (rows, {"sample": 0}, "sample=0 is not an integer ≥ 1"),
        (
            (rows[0],),
            {"at": "corrupted"},
            "at='corrupted' is not allowed without corrupted prompts. Use clean",
        ),
        (
            rows,
            {"at": "both"},
            "at='both' is not allowed with corrupted prompts. Use clean, corrupted, secant",
        ),
        (
            (rows[0], [p + " a" for p in rows[1]]),
            {},
            "must have the same number of tokens: prompt 0",
        ),
        (
            ([torch.tensor([1, 5, 6])] * 2, [torch.tensor([1, 5, 6]), torch.tensor([1, 5])]),
            {},
            r"Prompt 1 has 3 tokens, its corrupted prompt 2. Pad or reword",
        ),
        (
            rows,
            {"attention_mask": torch.ones(3, 9)},
            "attention_mask= is for token ids, but these prompts are strings",
        ),
        (
            ([torch.tensor([1, 5, 6]), torch.tensor([1, 5])],),
            {"attention_mask": torch.ones(2, 3).long()},
            "attention_mask= is for ids padded to one length, but",
        ),
        (
            ([torch.tensor([1, 5, 6])] * 2,),
            {"attention_mask": torch.full((2, 3), 0.5)},
            "attention_mask holds other numbers than 1 and 0. Give 1 where a token is real",
        ),
        (
            rows,
            {"path": tmp_path / "no" / "file"},
            "cannot be written. Pass a file in a folder that exists",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            tensorlens_tl.discover(model, *args, **{"n_edges": 5, **kwargs})
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"does not hold a search for a circuit.*delete the file"):
        tensorlens_tl.discover(model, *rows, n_edges=5, path=path)
    path.unlink()
    tensorlens_tl.discover(model, *rows, n_edges=5, path=path)
    for other in ({"pos": -2}, {"qk": False}, {"at": "corrupted"}, {"sample": 2}, {"gate": "half"}):
        with pytest.raises(
            ValueError, match=r"holds another search .*Pass another path=, or delete"
        ):
            tensorlens_tl.discover(model, *rows, n_edges=5, path=path, **other)
    with pytest.raises(ValueError, match="holds another search"):
        tensorlens_tl.discover(model, rows[0][::-1], *rows[1:], n_edges=5, path=path)
    data = json.loads(path.read_text())
    for done in (0, 9, "3", True):
        path.write_text(json.dumps({**data, "progress": {**data["progress"], "done": done}}))
        with pytest.raises(ValueError, match=r"prompts are done. It should say 1 to 3"):
            tensorlens_tl.discover(model, *rows, n_edges=5, path=path)


def test_circuits_say_what_was_put_in_front(model):
    text = "The capital of France is"
    found = [
        tensorlens_tl.discover(model, prompts, n_edges=2, **options)
        for prompts, options in (
            ([text], {}),
            ([text], {"prepend_bos": False}),
            ([model.to_tokens(text)], {}),
        )
    ]
    assert [one.convention.first_token for one in found] == ["<bos>", "", None]
    assert "<bos> added in front" in repr(found[0]) and "in front" not in repr(found[2])
    assert type(found[1]).from_json(found[1].to_json()).convention.first_token == ""


def test_columns_of_a_data_set_are_prompts_and_targets(model):
    """A column is a sequence, and neither a list nor an array."""
    rows, args = task(3), {"n_edges": 9, "progress": False}
    columns = [UserList(part) for part in rows]
    assert tensorlens_tl.discover(model, *columns, **args) == tensorlens_tl.discover(
        model, *rows, **args
    )
