"""An edit written into weights: one column of numbers times one row, added to an MLP's W_out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..checks import spelled, whole
from ..hosts import adapt
from ..maps import TINY
from ..operator import FrozenTransformer
from ..readers import alone
from ..sublayers import MLPWeights
from .edit import Edit
from .places import Place
from .smallest import EditCost


@spelled
@contextmanager
def to_weights(
    edit: Edit, model: Any, layer: int, covariance: Tensor | None = None
) -> Iterator[None]:
    """Write an edit of what an MLP leaves into the MLP's weights for a while.

    With the activations k that W_out reads at the edited position, and their second moments C,

        W_out ← W_out + (C⁻¹ k) δᵀ / (kᵀ C⁻¹ k)

    adds δ there, and least where activations are usual. This is the form of ROME (Meng et al.
    2022, arXiv 2202.05262), with δ from one sweep.

    Args:
        edit: An edit of one prompt at one position, at what block ``layer`` leaves.
        model: The model of the lens. Its weights are as before when the block ends.
        layer: Number of the block; −1 is the last.
        covariance: Second moments C of the activations [d_mlp, d_mlp], or [d_mlp]; None is the
            identity.

    Yields:
        Nothing; the weights are edited meanwhile.

    Raises:
        ValueError: If the edit is elsewhere, of several prompts or positions, or the weights are
            no matrix of the model that can be written to.

    Example:
        >>> from tensorlens_tl import demo, editing
        >>> model = demo.load_model()
        >>> _, lens = model.run_with_tensorlens("The capital of France is")
        >>> edit = lens.edit("Paris", versus="Rome", by=-14.0, site=1)
        >>> with editing.to_weights(edit, model, layer=1):
        ...     logits = model("The capital of France is")
        >>> model.tokenizer.decode([int(logits[0, -1].argmax())])
        'Rome'
    """
    operator = FrozenTransformer.of(edit.run)
    n_layers = operator.steps[-1].layer + 1
    number = whole(layer, "layer") % n_layers
    if edit.place.hook != Place.of(operator, number).hook:
        raise ValueError(
            f"layer={layer} leaves another residual than {edit.place.name}, which is edited. "
            "Edit what the block leaves: site=layer."
        )
    where = (edit.delta.abs().sum(-1) > 0).nonzero()
    if len(edit.delta) != 1 or len(where) != 1:
        raise ValueError(
            "An edit of weights is of one prompt and one position. Take lens[i], and pass one "
            "position as positions=."
        )
    step = next(s for s in reversed(operator.steps) if s.layer == number)
    branch = step.branches[-1]
    adapter = adapt(model)
    weights = adapter.weights.blocks[number].mlp
    if branch.has_heads or branch.post is not None or step.norm is not None:
        raise ValueError(
            f"Block {number} has a norm behind its MLP, or no MLP, so no change of W_out gives "
            "the edit. Edit with hooks instead."
        )
    # Some weights are made anew at every read (transposed, folded): writing to these does nothing.
    if not isinstance(weights, MLPWeights) or not _is_own(weights.W_out, adapter.model):
        raise ValueError(
            f"W_out of block {number} is no matrix that can be written to. Edit with hooks instead."
        )
    pos = int(where[0, 1])
    k = branch.body.hidden_in_run(branch.read(step.state))[:, pos : pos + 1]
    cost = EditCost("identity" if covariance is None else covariance, k, torch.ones(1, 1).bool())
    # With y = k W, the change C⁻¹k δᵀ / (kᵀC⁻¹k) adds δ at k, and (xᵀC⁻¹k) / (kᵀC⁻¹k) of it at x.
    key = cost.inverse(k)[0, 0]
    size = (key * k[0, 0]).sum()
    if not bool(size > TINY):
        raise ValueError("The MLP reads nothing at the edited position. Edit with hooks instead.")
    added = torch.outer(key / size, edit.delta[0, pos])
    # By .data, which leaves torch's count of writes: afterwards the weights are what lenses know.
    W_out = weights.W_out.data
    with alone(adapter.model):
        kept = W_out.clone()
        try:
            W_out.add_(added.to(kept))
            yield
        finally:
            # Copied back: subtracting what was added would leave rounding.
            W_out.copy_(kept)


def _is_own(W: Tensor, model: Any) -> bool:
    """Whether a matrix is a view of a parameter of the model."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return W.untyped_storage().data_ptr() in own
