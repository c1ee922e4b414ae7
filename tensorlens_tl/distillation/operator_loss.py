"""The distance between the operators of two models, as a loss.

Teacher and student share a vocabulary, but neither widths nor depths. So only what has token axes
alone is compared. u_i reads position i: the column of W_U for the teacher's own prediction, less
the mean of all columns, because a constant that is added to all logits changes no prediction.

    maps    M_ij = u_iᵀ T_ij x_j             what token j adds to that logit at i
    words   B_ijw = u_iᵀ T_ij (E_w + P_j)    what it would add, were the word w at j
    norms   N_ij = ‖T_ij‖_F                  by random probes: no readout is needed

A row of each is divided by its length in either model, and the squared distance is the loss. The
rows are those of a few positions i per prompt. One pull gives a row of M and of B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import kind_of, whole
from ..lens import TensorLens
from ..maps import TINY


@dataclass(frozen=True)
class OperatorLoss:
    """The distance between a student's operator and its teacher's, at a few rows per prompt.

    Formula: for every row i, ‖M_i / ‖M_i‖ − M'_i / ‖M'_i‖‖² + size · (log ‖M_i‖ − log ‖M'_i‖)²,
    where M_ij = u_iᵀ T_ij x_j is the map from token j to the teacher's prediction at i, with a
    centred readout u_i. The mean over rows is multiplied by ``maps``. Counterfactual rows, with
    other words in place of the prompt's own, and norms ‖T_ij‖_F have terms of the same kind. The
    distance of a row is at least 0, and at most 4 without ``size``.

    The student's lens is captured with ``graph=True``, so that gradients reach all of its weights,
    also through its patterns, scales and ratios. The teacher needs no graph.

    Attributes:
        maps: Factor of the maps.
        counterfactual: Factor of the counterfactual rows.
        norms: Factor of the norms.
        rows: How many positions per prompt are compared.
        words: How many random words per position the counterfactual rows have.
        probes: How many random signs per row estimate the norms. √(2 / probes) is the relative
            error of their squares.
        size: Factor of the difference of the rows' lengths.
        ramp: Two steps: the loss is 0 up to the first, and whole from the second. In between it
            rises linearly.
        seed: Seed of the rows, words and probes; every step draws others.

    Raises:
        ValueError: If a number is out of range, or two lenses do not fit; the message says which.

    Source: the operator is of Atad et al. (2026, arXiv 2601.17958).

    Example:
        >>> from tensorlens_tl import capture, demo
        >>> from tensorlens_tl.distillation import OperatorLoss
        >>> model = demo.load_model()
        >>> _, teacher = capture(model, "The capital of France is")
        >>> _, student = capture(model, "The capital of France is", graph=True)
        >>> loss = OperatorLoss(rows=2)(student, teacher)
        >>> bool(loss < 1e-9)  # a model is its own best student
        True
    """

    maps: float = 1.0
    counterfactual: float = 0.0
    norms: float = 0.0
    rows: int = 1
    words: int = 1
    probes: int = 4
    size: float = 0.0
    ramp: tuple[int, int] = (0, 0)
    seed: int = 0

    def __post_init__(self):
        for name in ("rows", "words", "probes"):
            if whole(getattr(self, name), name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1. Give 1 or more.")
        whole(self.seed, "seed")
        for name in ("maps", "counterfactual", "norms", "size"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} is no factor. Give 0 or more.")
        if len(self.ramp) != 2 or not 0 <= self.ramp[0] <= self.ramp[1]:
            raise ValueError(
                f"ramp={self.ramp} is no pair of steps. Give the step at which the loss begins and "
                "the one from which it is whole, such as (500, 1000)."
            )

    def weight(self, step: int) -> float:
        """The share of the loss that counts at a training step, from 0 to 1.

        Where it is 0, no lens is needed, and the step need not capture any.

        Args:
            step: Number of the training step, from 0.

        Returns:
            0 before the ramp, 1 after it.
        """
        start, stop = self.ramp
        if step >= stop:
            return 1.0
        return max(0.0, (step - start) / (stop - start))

    def __call__(
        self,
        student: TensorLens,
        teacher: TensorLens,
        weights: Float[Tensor, "batch pos"] | None = None,
        step: int = 0,
    ) -> Float[Tensor, ""]:
        """Compare the operators of two runs of the same prompts.

        Args:
            student: Lens of the student, captured with ``graph=True``.
            teacher: Lens of the teacher, on the same token ids.
            weights: How much the prediction at every position counts. Rows are drawn with these
                chances. None draws them evenly among the real tokens.
            step: Number of the training step, for the ramp and the draw.

        Returns:
            The loss, with a graph.

        Raises:
            ValueError: If the student has no graph, or the lenses are of other tokens or
                vocabularies.
        """
        self._check(student, teacher)
        total = self.weight(step) * student.embedding.new_zeros(())
        if not self.weight(step):
            return total
        # A wide stride: neighbouring seeds do not share the draws of neighbouring steps.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        query = self._query(student, weights, generator)
        parts = []
        if self.maps or self.counterfactual:
            parts += self._read(student, teacher, query, generator)
        if self.norms:
            signs = [
                _norms(lens, query, self.probes, self.seed + step) for lens in (student, teacher)
            ]
            parts.append((self.norms, *signs))
        for factor, ours, theirs in parts:
            total = total + factor * self.distance(ours, theirs)
        return self.weight(step) * total

    def distance(
        self, ours: Float[Tensor, "row batch entry"], theirs: Float[Tensor, "row batch entry"]
    ) -> Float[Tensor, ""]:
        """The mean distance between rows of a student and a teacher, each over its length."""
        # Gradients reach the student alone. The teacher may have another dtype.
        ours, theirs = ours.flatten(0, 1), theirs.flatten(0, 1).detach().to(ours)
        a, b = (torch.linalg.vector_norm(m, dim=-1).clamp_min(TINY) for m in (ours, theirs))
        # Models scale their logits differently, so directions are compared; ``size`` adds the
        # lengths.
        found = (ours / a[:, None] - theirs / b[:, None]).square().sum(-1)
        return (found + self.size * (a.log() - b.log()).square()).mean()

    def _read(
        self, student: TensorLens, teacher: TensorLens, query: Tensor, generator: torch.Generator
    ) -> list[tuple[float, Tensor, Tensor]]:
        """The maps and the counterfactual rows, with their factors."""
        prompts = torch.arange(query.shape[1], device=query.device)
        # Both models are read at the word that the teacher says.
        said = teacher.logits.detach()[prompts, query].argmax(-1)
        words, found = None, []
        if self.counterfactual:
            shape, many = (self.words, *student.embedding.shape[:2]), teacher.logits.shape[-1]
            words = torch.randint(many, shape, generator=generator).to(query.device)
        pairs = [_maps(lens, query, said, words) for lens in (student, teacher)]
        factors = (self.maps, self.counterfactual)
        for factor, ours, theirs in zip(factors, *pairs, strict=False):
            found += [(factor, ours, theirs)] if factor else []
        return found

    def _query(
        self, student: TensorLens, weights: Tensor | None, generator: torch.Generator
    ) -> Int[Tensor, "row batch"]:
        """Draw positions of every prompt, as often as they weigh."""
        real = student.capture.frame.real
        if weights is None:
            weights = real.float()
        elif weights.shape != real.shape:
            raise ValueError(
                f"weights= has shape {list(weights.shape)}, but the prompts have {list(real.shape)}"
                ". Give one weight per prompt and position."
            )
        # On the CPU, as the generator: a seed draws the same rows on every device.
        chances = torch.where(real, weights, 0).float().cpu()
        if not bool((chances.sum(-1) > 0).all()):
            raise ValueError("weights= is 0 all over a prompt. Leave such prompts out.")
        drawn = torch.multinomial(chances, self.rows, replacement=True, generator=generator)
        return drawn.T.to(real.device)

    def _check(self, student: TensorLens, teacher: TensorLens) -> None:
        for name, lens in (("student", student), ("teacher", teacher)):
            if not isinstance(lens, TensorLens):
                raise ValueError(f"{name} is {kind_of(lens)}. Pass the lens of a captured run.")
            if (
                lens.logits.ndim != 3
                or lens.capture.headless
                or lens.capture.unembed.head is not None
            ):
                raise ValueError(
                    f"{name} has no plain unembedding at every position. Distil causal language "
                    "models."
                )
        if not student.capture.frame.graph:
            raise ValueError(
                "student was captured without a graph. Capture with capture(..., graph=True)."
            )
        a, b = (lens.capture.prompts.tokens for lens in (student, teacher))
        if a is None or b is None or not torch.equal(a, b):
            raise ValueError("student and teacher ran on other tokens. Capture both on one prompt.")
        ours, theirs = student.logits.shape[-1], teacher.logits.shape[-1]
        if ours != theirs:
            raise ValueError(
                f"student has {ours} words and teacher {theirs}. Distil between models of one "
                "vocabulary."
            )


def rows_of(
    lens: TensorLens,
    query: Int[Tensor, "row batch"],
    tokens: Int[Tensor, "row batch"],
) -> Float[Tensor, "row batch pos"]:
    """Rows of the operator, from every token to one logit each, with a centred readout.

    Formula: M_ij = u_iᵀ T_ij x_j, u_i = W_U[t_i] − mean_v W_U[v]. A penalty on M at a position is a
    penalty on what the token there adds to the prediction.

    Args:
        lens: The lens. With ``graph=True`` the rows have gradients in the weights.
        query: Positions i, one per row and prompt, as indices that count padding.
        tokens: Ids t_i whose logits are read.

    Returns:
        One number per token, in logits.

    Example:
        >>> import torch
        >>> from tensorlens_tl import capture, demo
        >>> from tensorlens_tl.distillation import rows_of
        >>> model = demo.load_model()
        >>> logits, lens = capture(model, "The capital of France is")
        >>> row = rows_of(lens, torch.tensor([[5]]), logits[:, -1].argmax(-1)[None])
        >>> lens.tokens[0][row[0, 0].argmax()]
        'France'
    """
    return _maps(lens, query, tokens, None)[0]


def _pull(lens: TensorLens, query: Tensor, u: Tensor) -> Float[Tensor, "row batch pos d_model"]:
    """T_ijᵀ u_i for every j: one pull per row, the last MLP and W_O at that row alone."""
    operator, found = lens.operator, []
    prompts = torch.arange(query.shape[1], device=query.device)
    for at, covector in zip(query, u, strict=True):
        start = lens.capture.frame.zeros(operator.out_dim)
        start[prompts, at] = covector
        found.append(operator.pull(start, at).covectors[0])
    return torch.stack(found)


def _maps(
    lens: TensorLens, query: Tensor, tokens: Tensor, words: Tensor | None
) -> list[Float[Tensor, "row batch entry"]]:
    """Rows of M, and of B where there are words."""
    capture, cast = lens.capture, lens.capture.frame.cast
    W_U = cast(capture.unembed.weights.W_U)
    u = W_U.T[tokens] - W_U.mean(-1)
    pulled, real = _pull(lens, query, u), capture.frame.real
    found = [(pulled * lens.embedding).sum(-1)]
    if words is not None:
        # E_w + P_j: the embedding less the prompt's own word leaves what the position adds.
        others = _embedded(lens, words) + lens.embedding - capture.embeddings["embed"]
        found.append(torch.einsum("rbpd,wbpd->rbwp", pulled, others))
    # Random words were put at padding, too, which no model reads.
    found = [torch.where(real if m.ndim == 3 else real[:, None], m, 0) for m in found]
    return [m.flatten(2) for m in found]


def _embedded(lens: TensorLens, ids: Tensor) -> Float[Tensor, "*ids d_model"]:
    """What the model embeds words as: rows of W_E, if these are all that it adds."""
    capture = lens.capture
    weights, embed, tokens = capture.embed_weights, capture.embed, capture.prompts.tokens
    if weights is None or weights.norm is not None or embed is None or tokens is None:
        raise ValueError(
            f"counterfactual= needs rows of W_E, which {capture.model_name} does not add as they "
            "are. Leave counterfactual out."
        )
    W_E = capture.frame.cast(weights.W_E)
    start = capture.frame.spans[0][0]
    # One token tells: some models multiply all rows of W_E by one number.
    if not torch.allclose(W_E[tokens[0, start]], embed[0, start], rtol=1e-3):
        raise ValueError(
            f"counterfactual= needs rows of W_E, which {capture.model_name} multiplies. Leave "
            "counterfactual out."
        )
    return W_E[ids]


def _norms(
    lens: TensorLens, query: Tensor, probes: int, seed: int
) -> Float[Tensor, "row batch pos"]:
    """‖T_ij‖_F of every j by random signs: E ‖T_ijᵀ g‖² = ‖T_ij‖²_F."""
    frame, width = lens.capture.frame, lens.operator.out_dim
    generator = torch.Generator().manual_seed(seed)
    shape = (probes, *query.shape, width)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    signs = signs.to(frame.device, frame.dtype)
    # E g gᵀ = I, so E ‖T_ijᵀ g‖² = tr(T_ij T_ijᵀ) = ‖T_ij‖²_F.
    pulled = [_pull(lens, query, g).square().sum(-1) for g in signs]
    squares = torch.stack(pulled).mean(0)
    zero = squares == 0  # sources after the row, whatever the weights: the root has no slope there
    return torch.where(zero, 0, torch.where(zero, 1, squares).sqrt())
