"""Progress bars: one default everywhere, on standard error, after two seconds, and they move."""

import contextlib
import inspect

import pytest

import tensorlens_tl
from tensorlens_tl import checks, demo
from tensorlens_tl.circuits import AblationOptions
from tensorlens_tl.operator import batched_sweep

PROMPT = "The capital of France is"


def test_one_default():
    """Every public function with a bar shows it unless it is told not to."""
    found = {
        name: parameters["progress"].default
        for name in dir(tensorlens_tl)
        if inspect.isfunction(function := getattr(tensorlens_tl, name))
        and "progress" in (parameters := inspect.signature(function).parameters)
    }
    assert len(found) >= 5 and set(found.values()) == {True}, found
    assert AblationOptions().progress is True and checks.PROGRESS_AFTER == 2.0


def test_fast_work_shows_nothing(capsys):
    model = demo.load_model()
    capsys.readouterr()
    tensorlens_tl.attribute(model, [PROMPT, "The capital"])
    _, lens = model.run_with_tensorlens(PROMPT)
    lens.token_matrix("norm")
    captured = capsys.readouterr()
    assert captured.out == "" and "prompts" not in captured.err and "sweep" not in captured.err


def test_a_sweep_moves_by_layer(monkeypatch):
    class Bar(contextlib.nullcontext):
        def __init__(self, what, total, **options):
            super().__init__(self)
            self.total, self.moves = total, 0
            bars.append(self)

        def update(self):
            self.moves += 1

    bars = []
    monkeypatch.setattr(batched_sweep, "progress_bar", Bar)
    _, lens = demo.load_model().run_with_tensorlens(PROMPT)
    assert lens.plan("norm").chunks == 1
    lens.token_matrix("norm")
    (bar,) = bars
    assert bar.moves == bar.total > len(lens.capture.blocks)


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_may_be_turned_off(progress, capsys, monkeypatch):
    monkeypatch.setattr(checks, "PROGRESS_AFTER", 0)
    model = demo.load_model()
    capsys.readouterr()
    tensorlens_tl.attribute(model, [PROMPT, "The capital"], progress=progress)
    assert ("prompts" in capsys.readouterr().err) == progress
    model.run_with_tensorlens(PROMPT)[1].paths(k=1, progress=progress)
    shown = capsys.readouterr().err
    assert ("bounds of paths" in shown) == ("steps of paths" in shown) == progress
