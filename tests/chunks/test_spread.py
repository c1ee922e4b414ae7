"""Chunks in folders and processes: the same to the bit, whoever ran them and however often."""

import multiprocessing
import os
import socket

import pytest
import torch
from comparisons import assert_close

from tensorlens_tl import demo, discover, faithfulness, mean_attribution, score_edges
from tensorlens_tl.chunks import folder, spread
from tensorlens_tl.evaluation import evaluate
from tensorlens_tl.evaluation.scoring import score

pytestmark = pytest.mark.algebra

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def small(monkeypatch):
    """Chunks of two prompts."""
    monkeypatch.setattr(folder, "CHUNK", 2)


def numbers(start, stop):
    return {"sum": torch.rand(3, generator=torch.Generator().manual_seed(start)) * stop}


def gathered(path, n, run=numbers):
    found = [chunk["sum"] for chunk in spread(path, "a question", n, run, False)]
    return torch.stack(found)


# --- Processes ------------------------------------------------------------------------------------


def _process(work, rank, count, port, answers):
    from accelerate import PartialState

    PartialState._shared_state.clear()
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        found = work(rank)
    except ValueError as error:
        found = str(error)
    answers.put((rank, found.tolist() if isinstance(found, torch.Tensor) else found))
    torch.distributed.destroy_process_group()


def in_processes(count, work):
    """What every process returns, or the message that it refuses with, in order of rank."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = context.Queue()
    args = [(work, rank, count, port, answers) for rank in range(count)]
    started = [context.Process(target=_process, args=one, daemon=True) for one in args]
    for process in started:
        process.start()
    found = dict(answers.get(timeout=120) for _ in started)
    for process in started:
        process.join()
    return [found[rank] for rank in range(count)]


@forks
@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_chunks_and_all_have_the_same(small, tmp_path, count):
    whole, ran = gathered(tmp_path / "one", 9), tmp_path / "ran"
    ran.mkdir()

    def work(rank):
        def run(start, stop):
            (ran / f"{start} by {rank}").touch()
            return numbers(start, stop)

        return gathered(tmp_path / "many", 9, run)

    assert in_processes(count, work) == [whole.tolist()] * count
    assert len(list(ran.iterdir())) == 5  # each chunk once
    assert {name.name.split()[-1] for name in ran.iterdir()} == {str(i) for i in range(count)}


@forks
def test_what_one_process_refuses_all_refuse_and_the_rest_is_kept(small, tmp_path):
    def work(rank):
        def run(start, stop):
            if start == 6 and not (tmp_path / "mended").exists():
                raise ValueError("Prompt 6 is wrong. Reword it.")
            return numbers(start, stop)

        return gathered(tmp_path / "run", 9, run)

    first, second = in_processes(2, work)
    assert second == "Prompt 6 is wrong. Reword it." and first == f"Process 1 refused: {second}"
    (tmp_path / "mended").touch()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.safetensors")}
    assert kept and in_processes(3, work) == [gathered(tmp_path / "one", 9).tolist()] * 3
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


# --- Folders --------------------------------------------------------------------------------------


def test_stopped_at_every_chunk_nothing_is_lost(small, tmp_path):
    whole, calls = gathered(tmp_path / "one", 9), []

    def run(start, stop):
        calls.append(start)
        if len(calls) % 2 == 0:
            raise KeyboardInterrupt
        return numbers(start, stop)

    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            gathered(tmp_path / "run", 9, run)
    assert torch.equal(gathered(tmp_path / "run", 9, run), whole)
    assert sorted(set(calls)) == [0, 2, 4, 6, 8] and len(calls) == 9


def test_folders_of_something_else_are_refused(small, tmp_path):
    gathered(tmp_path / "run", 9)
    with pytest.raises(ValueError, match="holds another question"):
        list(spread(tmp_path / "run", "another question", 9, numbers))
    with pytest.raises(ValueError, match="is a folder of other files"):
        gathered(tmp_path, 9)
    with pytest.raises(ValueError, match="cannot be used"):
        gathered(tmp_path / "run" / "question.json", 9)
    (tmp_path / "run" / "00000001.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"cannot be read .* Delete the file"):
        gathered(tmp_path / "run", 9)
    with pytest.raises(ValueError, match="resume=3 is not a path"):
        gathered(3, 9)


# --- What is spread -------------------------------------------------------------------------------


def questions(folder_, model):
    """Every study, as numbers."""
    pairs = demo.prompts("ioi", 3)
    texts, twins = [p.clean for p in pairs], [p.corrupted for p in pairs]
    answers = [p.answer for p in pairs]
    goal, quiet = (answers, [p.foil for p in pairs]), {"progress": False}

    def kept(name):
        return None if folder_ is None else folder_ / name

    circuit = discover(model, texts, twins, *goal, n_edges=9, resume=kept("circuit"), **quiet)
    scores = score_edges(model, texts, twins, "eap", *goal, resume=kept("scores"), **quiet)
    means = mean_attribution(model, iter(texts), *goal, resume=kept("means"), **quiet)
    share = faithfulness(model, texts, circuit, twins, *goal, resume=kept("share"), progress=False)
    tested = evaluate(
        *(model, iter(texts), ["in_out", "random"], ["perturbation", "leave_one_out"]),
        *(["delete", "mean"],),
        scores={"own": [list(range(model.to_tokens(text).shape[1])) for text in texts]},
        resume=kept("tested"),
        **quiet,
    )
    found = [*(x for row in tested.rows for x in row.values), *tested.lengths]
    found += tested.runs.values()
    found += [*share.full.tolist(), *share.ablated.tolist(), *share.circuit.tolist()]
    found += [*circuit.scores.values(), *scores.values(), *means.mean.tolist(), *means.sem.tolist()]
    return torch.tensor([*found, means.target_mean, means.completeness_error, means.n])


@forks
def test_every_study_is_the_same_by_many_processes_and_by_one(small, tmp_path):
    model, many = demo.load_model(), tmp_path / "many"
    plain, one = questions(None, model), questions(tmp_path / "one", model)
    assert_close(one, plain, 1e-5)
    assert in_processes(2, lambda rank: questions(many, model)) == [one.tolist()] * 2
    lost = [*many.glob("*/00000000.safetensors")]  # one of two chunks of every study
    assert len(lost) == 5
    for file in lost:
        file.unlink()
    assert in_processes(3, lambda rank: questions(many, model)) == [one.tolist()] * 3
    assert torch.equal(questions(many, model), one)  # all from the folder


def test_what_cannot_be_kept_is_refused(tmp_path):
    model, texts = demo.load_model(), ["a b", "b a"]
    both = {"resume": tmp_path / "run", "path": tmp_path / "file"}
    with pytest.raises(ValueError, match="path= and resume= are both given"):
        discover(model, texts, n_edges=3, **both)
    with pytest.raises(ValueError, match="path= is written by one call without resume="):
        mean_attribution(model, texts, **both)
    with pytest.raises(ValueError, match="resume= cannot tell metric= functions apart"):
        score_edges(model, texts, texts, metric=lambda a, i: a[:, 0], resume=tmp_path / "run")
    with pytest.raises(ValueError, match="resume= needs ablation='resample' or 'zero'"):
        faithfulness(model, texts, [], ablation="mean", resume=tmp_path / "run")


def test_an_evaluation_is_kept_by_all_that_it_depends_on(small, tmp_path):
    """Other maskings, targets or scores are another question; refusals name prompts of the call."""
    model = demo.load_model()
    texts = [p.clean for p in demo.prompts("ioi", 3)]
    asked = {"methods": ["random"], "resume": tmp_path / "run", "progress": False}
    first = evaluate(model, texts, **asked)
    assert evaluate(model, texts, **asked).rows == first.rows
    scored = score(model, texts, ["random"], progress=False)
    for change in (
        {"masking": "mean"},
        {"target": first.targets},
        {"versus": "runner_up"},
        {"seed": 1},
        {"methods": [], "scores": {"own": [[0.0] * len(ids) for ids in scored.prompts]}},
    ):
        with pytest.raises(ValueError, match="holds another question"):
            evaluate(model, texts, **asked | change)
    asked["resume"] = tmp_path / "scored"
    assert evaluate(model, scored, **asked).rows == first.rows
    with pytest.raises(ValueError, match="Prompt 2 has 1 tokens that may be masked"):
        evaluate(model, [*texts[:2], "a"], **asked | {"resume": tmp_path / "short"})
    with pytest.raises(ValueError, match="is predicted by no prompt"):
        evaluate(model, texts, **asked | {"resume": tmp_path / "none", "target": "the"})
