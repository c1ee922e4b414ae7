"""Sentence vectors, and where the similarity of two sentences comes from.

A sentence encoder pools its final residuals y_p into one vector, v = Σ_p m_p y_p. The weights m_p
are 1/n at the n real tokens ("mean"), or 1 at the first ("cls"). The similarity of two sentences is

    cos(a, b) = ⟨v_a, v_b⟩ / (‖v_a‖ ‖v_b‖) = Σ_p ⟨u_p, y_p⟩,     u_p = m_p v_b / (‖v_a‖ ‖v_b‖)

With the other sentence and the norm ‖v_a‖ held, it is linear in the residuals of sentence a. So it
is split like any other target, and the rows of sentence a alone sum to the similarity. The rows of
sentence b do so, too: the product is bilinear.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import Attribution, Target, TargetGradient, attribute, attribute_many
from ..checks import kind_of, spelled
from ..maps import Frame
from ..operator import Capture, FrozenTransformer
from .edited_run import EditedRun
from .frozen_run import FrozenRun

POOLINGS = ("mean", "cls")
"""How positions are pooled: the mean of all real tokens, or the first token."""


def sentence_vectors(
    capture: Capture, pooling: str = "mean", normalize: bool = True
) -> Float[Tensor, "batch d_model"]:
    """Pool the final residuals of every prompt.

    Args:
        capture: The captured run.
        pooling: "mean" or "cls".
        normalize: Whether to divide each vector by its length.

    Returns:
        One vector per prompt.

    Raises:
        ValueError: If ``pooling`` has another value, or a vector that is to be divided is zero.
    """
    y = capture.unembed.final
    found = (_weights(capture.frame, pooling)[..., None] * y).sum(1)
    return found / _lengths(found) if normalize else found


def _weights(frame: Frame, pooling: str) -> Float[Tensor, "batch pos"]:
    if pooling not in POOLINGS:
        raise ValueError(
            f"pooling={pooling!r} does not exist. Use 'mean' (all real tokens) or 'cls' (the first "
            "token)."
        )
    weights = frame.real.to(frame.dtype)
    if pooling == "cls":
        weights = torch.zeros_like(weights)
        weights[torch.arange(frame.batch), frame.index(0)] = 1
    return weights / weights.sum(1, keepdim=True)


def _lengths(vectors: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch 1"]:
    lengths = vectors.norm(dim=-1, keepdim=True)
    if bool((lengths == 0).any()):
        raise ValueError("A sentence vector is 0, so it has no direction. Pass normalize=False.")
    return lengths


def similarity(
    capture: Capture,
    operator: FrozenTransformer,
    other: Float[Tensor, "other d_model"],
    by: str = "token",
    pooling: str = "mean",
    normalize: bool = True,
) -> Attribution:
    """Split the similarity to other sentence vectors by source.

    Args:
        capture: The captured run, one or several sentences.
        operator: The operator of that run.
        other: One vector for all sentences, or one per sentence; divided by its length already if
            ``normalize`` is set.
        by: The kind of source, as in :meth:`TensorLens.attribute`.
        pooling: "mean" or "cls".
        normalize: Whether the similarity is a cosine; else it is a product of vectors.

    Returns:
        Contributions that sum to the similarity.
    """
    frame, y = capture.frame, capture.unembed.final
    mine = sentence_vectors(capture, pooling, False)
    direction = other.to(y).expand_as(mine)
    if normalize:
        direction = direction / _lengths(mine)  # held: the similarity is linear in what is pooled
    u = _weights(frame, pooling)[..., None] * direction[:, None]
    names = (f"{'cosine' if normalize else 'product'} of sentence vectors",) * frame.batch
    value = (u * y).sum((1, 2))
    goal = Target(names, frame.index(0), u[:, 0], {}, value)
    if by in ("token", "constant"):  # one sweep from all positions
        return attribute(TargetGradient(capture, operator, goal, operator.pull(u)), by)
    # Everything else is split at each position, and summed.
    goals, prompts = [], torch.arange(frame.batch, device=y.device)
    for pos in range(int(frame.real.sum(1).max())):
        query = torch.tensor([min(a + pos, b - 1) for a, b in frame.spans], device=y.device)
        here = torch.tensor([a + pos < b for a, b in frame.spans], device=y.device)
        covector = u[prompts, query] * here[:, None]
        at = (covector * y[prompts, query]).sum(-1)
        goals.append(Target(names, query, covector, {}, at))
    parts = list(attribute_many(capture, operator, goals, by))
    values = torch.stack([part.values for part in parts]).sum(0)
    return replace(parts[0], values=values, target_value=value)


def other_vectors(
    given: Any, capture: Capture, pooling: str, normalize: bool
) -> Float[Tensor, "other d_model"]:
    """What a user compares with, as vectors.

    Args:
        given: Another lens, or vectors [d_model] or [prompt, d_model].
        capture: The captured run of the sentences that are compared.
        pooling: "mean" or "cls".
        normalize: Whether to divide each vector by its length.

    Returns:
        One vector, or one per sentence.

    Raises:
        ValueError: If the vectors have another width or number.
    """
    if isinstance(run := getattr(given, "capture", None), Capture):
        found = sentence_vectors(run, pooling, normalize)
    elif isinstance(given, Tensor) and given.ndim in (1, 2) and given.is_floating_point():
        found = given.detach() if given.ndim == 2 else given.detach()[None]
        found = found / _lengths(found) if normalize else found
    else:
        raise ValueError(
            f"other is {kind_of(given)}, which has no sentence vector. Pass the lens of another "
            "sentence, or a vector [d_model]."
        )
    n, width = capture.frame.batch, capture.unembed.final.shape[-1]
    if found.shape[-1] != width or len(found) not in (1, n):
        raise ValueError(
            f"other has {len(found)} vectors of width {found.shape[-1]} for {n} sentences of width "
            f"{width}. Pass one, or one per sentence, of the same model."
        )
    return found


@spelled
class PooledRun(EditedRun):
    """A captured run whose final residuals are pooled into sentence vectors."""

    def sentence_vectors(
        self, pooling: str = "mean", normalize: bool = True
    ) -> Float[Tensor, "batch d_model"]:
        """Pool the final residuals of every prompt into one vector, as sentence encoders do.

        Args:
            pooling: "mean" of all real tokens, or "cls" for the first token.
            normalize: Whether to divide each vector by its length.

        Returns:
            One vector per prompt.

        Raises:
            ValueError: If ``pooling`` has another value, or a vector that is to be divided is zero.

        Example:
            >>> import tensorlens_tl
            >>> from transformers import BertConfig, BertModel
            >>> sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32)
            >>> model = BertModel(BertConfig(num_hidden_layers=1, vocab_size=50, **sizes)).eval()
            >>> _, lens = tensorlens_tl.capture(model, [[2, 7, 9, 3], [2, 8, 9, 3]])
            >>> lens.sentence_vectors().shape
            torch.Size([2, 16])
        """
        self._check_ready()
        return sentence_vectors(self.capture, pooling, normalize)

    def attribute_similarity(
        self,
        other: FrozenRun | Float[Tensor, "*prompt d_model"],
        by: str = "token",
        *,
        pooling: str = "mean",
        normalize: bool = True,
    ) -> Attribution:
        """Split the similarity of two sentences by what this sentence's side of it comes from.

        Formula: cos(a, b) = Σ_p ⟨u_p, y_p⟩ with u_p = m_p v_b / (‖v_a‖ ‖v_b‖), where v are the
        pooled vectors and m the weights of the pooling. The other sentence and ‖v_a‖ are held. All
        rows sum to the similarity itself, not to a half of it. For the other side, swap the lenses.

        Args:
            other: Lens of the other sentence, of one sentence or of as many as this one; or a
                vector [d_model], or one per sentence, such as the mean of many sentence vectors.
            by: The kind of source, as in :meth:`attribute`: "token", "constant", "component",
                "layer", "head", "neuron", "dimension", "order" or "edge".
            pooling: "mean" of all real tokens, or "cls" for the first token.
            normalize: Whether the similarity is a cosine; False takes the product of the vectors.

        Returns:
            Contributions in units of the similarity.

        Raises:
            ValueError: If ``by`` or ``pooling`` does not exist, or the vectors do not fit.

        Example:
            >>> import tensorlens_tl
            >>> from transformers import BertConfig, BertModel
            >>> sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32)
            >>> model = BertModel(BertConfig(num_hidden_layers=1, vocab_size=50, **sizes)).eval()
            >>> _, a = tensorlens_tl.capture(model, [2, 7, 9, 3])
            >>> _, b = tensorlens_tl.capture(model, [2, 8, 9, 3])
            >>> rows = a.attribute_similarity(b)
            >>> cosine = (a.sentence_vectors() * b.sentence_vectors()).sum()
            >>> bool((rows.values.sum() - cosine).abs() < 1e-5)
            True
        """
        self._check_ready()
        vectors = other_vectors(other, self.capture, pooling, normalize)
        return similarity(self.capture, self._operator, vectors, by, pooling, normalize)
