"""Every name that transformer_lens registers, tried: exact, refused, or a fault.

1. Make a tiny random model of the class by a rule (``configurations``), in float64.
2. Run it as it is, and again with frozen quantities held by autograd (``frozen_gradient``).
3. Capture it, and compare what the lens says with both (:func:`exactness`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ..attribution import TargetGradient, resolve
from ..maps import TINY
from ..passes import edge_model
from ..plugin import capture
from .configurations import ELSEWHERE, hugging_face_class, model_dtype, tiny_config
from .frozen_gradient import PlainRun, plain_run
from .tiny_models import D_VOCAB, NATIVE, build_native, find, quiet, randomize

EXACT = 1e-5
"""Largest relative error that counts as exact. Hosts compute norms in float32, which costs 1e-7."""

OUTCOMES = ("exact", "refused", "not built", "wrong", "crashed")
"""Outcomes. "not built": transformers has no such class, or cannot build or run it. "wrong" and
"crashed" are errors of this library."""

_FACTORY = "transformer_lens.factories.architecture_adapter_factory"


QUESTIONS = ("edges", "query/key", "secant", "circuits", "recomputed")
"""What some models cannot answer; each is asked in :func:`answers`."""


@dataclass(frozen=True)
class Name:
    """The outcome of one registered name.

    Attributes:
        name: The name, as transformer_lens registers it.
        outcome: One of :data:`OUTCOMES`.
        errors: Relative errors by what was compared; see :func:`exactness`.
        reason: Why it is not exact: the first sentence.
        no_adjoint: Why no adjoint was compared with autograd; "" where one was.
        answers: For every one of :data:`QUESTIONS` "", or why it is refused. Empty unless exact.
    """

    name: str
    outcome: str
    errors: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    no_adjoint: str = ""
    answers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Give the largest error of an exact name, or the outcome."""
        error = f"{max(self.errors.values()):.0e}" if self.errors else ""
        return error if self.outcome == "exact" else f"{self.outcome} {error}".rstrip()


def registered() -> tuple[str, ...]:
    """The names that the installed transformer_lens registers, in its order."""
    return tuple(find(_FACTORY, "SUPPORTED_ARCHITECTURES") or ())


@contextmanager
def without_processor(name: str) -> Iterator[None]:
    """Let the host wrap a model without the libraries that only its processor of pictures needs.

    Args:
        name: The name, as transformer_lens registers it.
    """
    adapter = find(_FACTORY, "SUPPORTED_ARCHITECTURES").get(name)
    with patch.object(adapter, "required_libraries", [], create=True):
        yield


def tiny_model(name: str) -> Any:
    """Build a tiny random model of a registered name, in evaluation mode.

    Args:
        name: The name, as transformer_lens registers it.

    Returns:
        The Hugging Face model, or None where transformers has no such class.
    """
    if (cls := hugging_face_class(name)) is None:
        return None
    torch.manual_seed(0)
    model = cls(tiny_config(cls.config_class)).to(model_dtype(name)).eval()
    randomize(model, seed=1)
    return model


def tiny_inputs(model: Any, batch: int = 2, pos: int = 7) -> dict[str, Tensor]:
    """Random inputs of a model: token ids, pixels or sound.

    Args:
        model: A Hugging Face model, made by :func:`tiny_model`.
        batch: Number of prompts.
        pos: Number of tokens.

    Returns:
        Arguments of the model's forward pass.
    """
    rng, config = torch.Generator().manual_seed(0), model.config
    ids = torch.randint(3, 40, (batch, pos), generator=rng, device="cpu")
    if getattr(config, "is_encoder_decoder", False):
        return {"input_ids": ids, "decoder_input_ids": ids}
    kind = model.main_input_name
    if kind in ("input_ids", "inputs"):
        return {"input_ids": ids}
    shape: tuple[int, ...] = (batch, 400)  # a sound
    if kind == "pixel_values":
        shape = (batch, config.num_channels, config.image_size, config.image_size)
    elif hasattr(config, "num_mel_bins"):
        shape = (batch, config.max_length, config.num_mel_bins)
    x = torch.randn(shape, generator=rng, dtype=torch.float64, device="cpu")
    return {kind: x.to(model.dtype)}


def exactness(lens: Any, plain: PlainRun) -> dict[str, float]:
    """Compare a lens with the Hugging Face model that no host has touched.

    Args:
        lens: A capture of the model on the same inputs.
        plain: What the model gave before it was wrapped.

    Returns:
        Relative errors: "logits" of readout(T X + c), the sums by "token" and by "component" of the
        target's logit, and the "adjoint", Tᵀ against autograd, where there is such a gradient.
    """
    logits = plain.logits
    pos: dict[str, Any] = {} if plain.pos == -1 else {"pos": plain.pos}
    size = float(logits.abs().max().clamp_min(TINY))
    ours = lens.readout(lens.operator.apply(lens.embedding) + lens.operator.bias)
    found = {"logits": float((ours - logits).abs().max()) / size}
    for by in ("token", "component"):
        values = lens.attribute(plain.target, by=by, **pos).values
        off = values.double().sum(-1) - plain.value(logits)
        found[by] = float(off.abs().max()) / size
    if plain.gradient is not None:
        goal = resolve(lens.capture, plain.target, **pos)
        g = TargetGradient(lens.capture, lens.operator, goal).trace.covectors[0]
        off = (g - plain.gradient).abs().max() / plain.gradient.abs().max().clamp_min(TINY)
        found["adjoint"] = float(off)
    return found


def answers(
    lens: Any, plain: PlainRun, model: Any, given: Any, kwargs: Mapping[str, Any]
) -> dict[str, str]:
    """Ask a lens every question that some models cannot answer.

    Args:
        lens: The lens of one run.
        plain: What the model gave before it was wrapped.
        model: The host model.
        given: What was run: token ids or the like.
        kwargs: Other arguments of that run.

    Returns:
        For every one of :data:`QUESTIONS` "", or the first sentence of its refusal.

    Raises:
        ArithmeticError: If what is answered does not sum to what it should, or if the model with
            all of its edges is another one.
    """
    target = plain.target
    pos: dict[str, Any] = {} if plain.pos == -1 else {"pos": plain.pos}

    def secant() -> Any:
        other = capture(model, given.flip(0), **kwargs)[1]
        return lens.attribute(target, baseline=other, at="secant", **pos)

    def circuit() -> None:
        found = lens.discover(target, n_edges=4, **pos)
        found.faithfulness(model, given[:1], target=target, ablation="zero", **kwargs)
        with torch.no_grad(), edge_model(model) as edges:  # every edge kept is the model
            sizes = len(edges.universe.readers), len(edges.universe.writers)
            every = torch.ones(1, *sizes, dtype=plain.logits.dtype)
            whole = edges.run(given, every).logits.reshape(plain.logits.shape)
        off = float((whole - plain.logits).abs().max() / plain.logits.abs().max().clamp_min(TINY))
        if not off <= EXACT:
            raise ArithmeticError(f"The model run edge by edge is off by {off:.0e}")

    asked: dict[str, Callable[[], Any]] = {
        "edges": lambda: lens.attribute(target, by="edge", **pos),
        "query/key": lambda: lens.attribute(target, by="edge", qk=True, **pos),
        "secant": secant,
        "circuits": circuit,
        "recomputed": lambda: capture(model, given, pattern="recomputed", **kwargs)[1],
    }
    found = {}
    for question, ask in asked.items():
        try:
            off = getattr(ask(), "completeness_error", None)
        except ValueError as refusal:
            found[question] = first_sentence(refusal)
        else:
            found[question] = ""
            if off is not None and not off <= EXACT:
                raise ArithmeticError(f"{question} is off by {off:.0e}")
    return found


def try_name(name: str, ask: bool = False) -> Name:
    """Try one registered name.

    Args:
        name: The name, as transformer_lens registers it.
        ask: Whether to ask also what some models cannot answer (:func:`answers`).

    Returns:
        The outcome. No error of transformers, of the host or of the library is raised.
    """
    with quiet(), without_processor(name):
        if name == "TransformerLensNative":
            return _try_native(name, ask)
        if name in ELSEWHERE:
            return Name(name, "not built", reason=ELSEWHERE[name])
        try:
            # 1. A tiny model.
            model = tiny_model(name)
            if model is None:
                why = f"transformers {_version()} has no class {name}: its code is on the hub only"
                return Name(name, "not built", reason=why)
            # 2. Its own run, and the gradient with frozen quantities held.
            plain = plain_run(model, inputs := tiny_inputs(model))
        except Exception as failure:
            why = f"transformers {_version()} cannot build it here ({first_sentence(failure)})"
            return Name(name, "not built", reason=why)
        return _compare(name, model, inputs, plain, ask)


def _compare(
    name: str, model: Any, inputs: Mapping[str, Tensor], plain: PlainRun, ask: bool
) -> Name:
    kwargs: dict[str, Any] = dict(inputs)
    given = kwargs.pop(next(iter(inputs)))
    answered: dict[str, str] = {}
    try:
        # 3. The capture, compared with both.
        lens = capture(model, given, **kwargs)[1]
        errors = exactness(lens, plain)
        if ask:
            answered = answers(lens, plain, model, given, kwargs)
    except ValueError as refusal:
        return Name(name, "refused", reason=first_sentence(refusal))
    except Exception as crash:
        why = f"{type(crash).__name__}: {first_sentence(crash)}"
        return Name(name, "crashed", reason=why)
    errors = {what: float(f"{error:.1e}") for what, error in errors.items()}
    exact = all(error <= EXACT for error in errors.values())  # NaN is wrong, too
    outcome = "exact" if exact else "wrong"
    return Name(name, outcome, errors, "", plain.no_gradient, answered)


def _try_native(name: str, ask: bool) -> Name:
    """``boot_native`` has no Hugging Face model: its Bridge is the model itself."""
    if not hasattr(find("transformer_lens.model_bridge", "TransformerBridge"), "boot_native"):
        return Name(name, "not built", reason="this transformer_lens has no boot_native")
    model = build_native(NATIVE["llama"], torch.float64)
    ids = torch.randint(0, D_VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids, return_type="logits")
    plain = PlainRun(logits, 3, -1, None, "it has no Hugging Face model")
    return _compare(name, model, {"input_ids": ids}, plain, ask)


def first_sentence(error: Exception) -> str:
    """The first sentence of an error's message."""
    return re.split(r"\.\s+(?=[A-Z])|;\s|\n", str(error).strip())[0].rstrip(".")


def _version() -> str:
    return metadata.version("transformers")


def try_all(names: Iterable[str] = ()) -> tuple[Name, ...]:
    """Try registered names.

    Args:
        names: The names; empty for every one that the installed transformer_lens registers.

    Returns:
        The outcome of each name, in their order.
    """
    return tuple(try_name(name, ask=True) for name in (tuple(names) or registered()))


def summary(names: Iterable[Name]) -> str:
    """Count the outcomes of names, in one line."""
    outcomes = [name.outcome for name in names]
    counts = ", ".join(f"{outcomes.count(o)} {o}" for o in OUTCOMES if o in outcomes)
    return f"{len(outcomes)} names: {counts}"
