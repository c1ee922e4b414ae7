"""What the features of a dictionary are in one run, and what they leave out.

    y_p = Σ_f z_pf d_f + b_dec + ε_p,     times σ_p, plus μ_p, where the dictionary normalises

y is what stands where the dictionary writes. z is made of what it reads: of y itself, or for a
transcoder of an MLP's input x, of which W_skip x is a part of the sum, too.

The error ε is what this equation says it is, computed in float64. So it is exact for every
dictionary, however bad.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import spelled
from ..graph import Node, layer_site, resid_site
from ..operator import Capture, FrozenTransformer
from ..readers import MLP_OUT, SUBLAYER_SITES
from .dictionary import CHUNK_BYTES, FeatureDictionary
from .places import Place, input_of, place_of


@dataclass(frozen=True, eq=False)
class Reading:
    """The features of one dictionary in one run.

    Attributes:
        dictionary: The SAE or transcoder that is read.
        place: Where it writes in the run.
        at: The position of every active feature, as an index of batch · pos.
        features: The number of every active feature.
        acts: The activation of each.
        error: What the dictionary leaves out [batch, pos, d_out].
        skipped: W_skip x of a transcoder with a skip connection [batch, pos, d_out], or None.
        unscale: What a reconstruction was multiplied by [batch · pos].
        shift: What was added to it in every dimension [batch · pos].
        n_real: The number of real tokens of all prompts.
    """

    dictionary: FeatureDictionary
    place: Place
    at: Int[Tensor, " n"]
    features: Int[Tensor, " n"]
    acts: Float[Tensor, " n"]
    error: Float[Tensor, "batch pos d_out"]
    skipped: Float[Tensor, "batch pos d_out"] | None
    unscale: Float[Tensor, " batch_pos"]
    shift: Float[Tensor, " batch_pos"]
    n_real: int

    @classmethod
    def of(
        cls, dictionary: FeatureDictionary, capture: Capture, operator: FrozenTransformer
    ) -> Reading:
        """Read the features of a run.

        Args:
            dictionary: An SAE, or a transcoder.
            capture: The captured run.
            operator: The operator of that run.

        Returns:
            All features that fire at real tokens, and the error.

        Raises:
            ValueError: If the dictionary is of another model, width or site.
        """
        check_fits(dictionary, capture)
        place = Place.of(dictionary.writes, operator)
        x, y = input_of(dictionary, operator, capture), place.state(operator, capture)
        check_width("reads", dictionary, dictionary.d_in, dictionary.site, x)
        check_width("writes", dictionary, dictionary.W_dec.shape[-1], dictionary.writes, y)
        real = capture.frame.real.flatten()
        # Padding is never encoded: hosts leave any numbers there, which would fire features.
        rows = x.flatten(0, 1)[real]
        where = real.nonzero().flatten()
        at, features, acts = dictionary.sparse(rows)
        # In float64: the error is a small difference of large vectors.
        norm = dictionary.normed(rows.double())
        unscale = x.new_ones(len(real), dtype=torch.float64)
        shift = torch.zeros_like(unscale)
        for whole, part in ((unscale, norm.unscale), (shift, norm.shift)):
            whole[real] = part.flatten() if isinstance(part, Tensor) else part
        at = where[at]  # from rows of real tokens to places in batch · pos
        found = decoded(dictionary.W_dec, at, features, acts, len(real))
        # The norm is undone for b_dec, too: it is a part of the normalised reconstruction.
        found = (found + dictionary.b_dec.to(found)) * unscale[:, None] + shift[:, None]
        skipped = None
        if dictionary.W_skip is not None:
            skipped = x.double() @ dictionary.W_skip.to(found)
            found += skipped.flatten(0, 1)
        error = (y.flatten(0, 1).double() - found) * real[:, None]
        return cls(
            dictionary,
            place,
            at,
            features,
            acts,
            error.view_as(y).to(y),
            None if skipped is None else skipped.to(y),
            unscale.to(x),
            shift.to(x),
            len(rows),
        )

    @property
    def site(self) -> str:
        """The site in short, such as "L2.pre"."""
        return f"L{self.place.layer}.{self.place.name}"

    def node(self, feature: int) -> Node:
        """The node of a feature."""
        return Node("feature", self.place.layer, feature, self.place.name)

    def constant(self, name: str) -> Node:
        """The node of a constant of the dictionary."""
        return Node("constant", self.place.layer, name=f"{self.place.name}.{name}")

    def beside_node(self, kind: str) -> Node:
        """The node of what stands beside the features: "error", "skip" or "past"."""
        return Node(kind, self.place.layer, name=self.place.name)

    @cached_property
    def spots(self) -> tuple[Int[Tensor, " row"], Int[Tensor, " n"]]:
        """The rows of a table, pos · d_sae + feature in order; and the row of every activation."""
        n_pos = self.error.shape[1]
        # One number per pair, in the order of positions; all prompts share the rows of a table.
        keys = (self.at % n_pos) * self.dictionary.d_sae + self.features
        return keys.unique(return_inverse=True)

    def acts_of(self, feature: int) -> Float[Tensor, "batch pos"]:
        """The activation of one feature at every position.

        Args:
            feature: The number of the feature.

        Returns:
            The activations, 0 where the feature does not fire.
        """
        found, own = torch.zeros_like(self.unscale), self.features == feature
        found[self.at[own]] = self.acts[own]
        return found.view(self.error.shape[:2])

    def check_below(self, operator: FrozenTransformer) -> None:
        """Refuse a site after that of a target.

        Args:
            operator: The operator up to the target.

        Raises:
            ValueError: If the site comes later.
        """
        if self.place.first_after > len(operator.steps):
            raise ValueError(
                f"{self.dictionary} comes after the target's site. Pass an SAE of that site or one "
                "before it."
            )

    def beside(
        self, covectors: Float[Tensor, "*many batch pos d_out"]
    ) -> dict[Node, Float[Tensor, "*many batch pos"]]:
        """⟨covector, what stands beside the features⟩: b_dec, a mean or a skip if any, the error.

        Args:
            covectors: Gradients of targets at the place.

        Returns:
            The products at every position, by node.
        """
        g, shape = covectors, self.error.shape[:2]
        unscale, shift = self.unscale.view(shape), self.shift.view(shape)
        found = {self.constant("b_dec"): unscale * (g @ self.dictionary.b_dec.to(g))}
        if self.dictionary.norm == "layer_norm":
            # The shift μ is added to every dimension: ⟨g, μ 1⟩ = μ Σ g.
            found[self.constant("mean")] = shift * g.sum(-1)
        if self.skipped is not None:
            found[self.beside_node("skip")] = (g * self.skipped).sum(-1)
        return found | {self.beside_node("error"): (g * self.error).sum(-1)}

    def shares(self, covectors: Float[Tensor, "*many batch pos d_out"]) -> Tensor:
        """⟨covector, z d⟩ of every active feature: one gather and one product per chunk.

        Args:
            covectors: Gradients of targets at the place.

        Returns:
            One number per target and active feature [..., n].
        """
        W, flat = self.dictionary.W_dec, covectors.flatten(-3, -2)
        found = flat.new_empty(*flat.shape[:-2], len(self.at))
        many = max(1, flat[..., 0, 0].numel())
        size = max(1, CHUNK_BYTES // (flat.shape[-1] * flat.element_size() * (1 + many)))
        for start in range(0, len(self.at), size):
            cut = slice(start, start + size)
            g, d = flat[..., self.at[cut], :], W[self.features[cut]].to(flat)
            found[..., cut] = torch.einsum("...nd,nd->...n", g, d)
        # Activations multiply the products, not the decoder rows: n numbers in place of n · d.
        return found * (self.acts * self.unscale[self.at])


@spelled
def check_model(dictionary: FeatureDictionary, capture: Capture) -> None:
    """Refuse a dictionary of another model.

    Args:
        dictionary: An SAE, or a transcoder.
        capture: The captured run.

    Raises:
        ValueError: If the names of both models are known, and differ.
    """
    ours, theirs = _short(capture.model_name), _short(dictionary.model_name)
    if ours and theirs and ours != theirs:
        raise ValueError(
            f"The {dictionary.architecture} dictionary was trained on {dictionary.model_name!r}, "
            f"and this run is of {capture.model_name!r}. Pass one of this model, or load it with "
            "config={'model_name': ''} if the names mean the same."
        )


@spelled
def check_fits(dictionary: FeatureDictionary, capture: Capture) -> None:
    """Refuse a dictionary of another model, or one that no place of a run can be read by.

    Args:
        dictionary: An SAE, or a transcoder.
        capture: The captured run.

    Raises:
        ValueError: If the dictionary does not fit.
    """
    check_model(dictionary, capture)
    if dictionary.W_dec.ndim == 3:
        raise ValueError(
            f"{dictionary} writes to several layers, and a split by feature reads one place. Pass "
            "an SAE, or a transcoder of one layer."
        )
    layer, _ = place_of(dictionary.writes)
    if layer < 0:
        known = [resid_site(2, "pre"), *(layer_site(2, point) for point in SUBLAYER_SITES)]
        raise ValueError(
            f"{dictionary} writes at {dictionary.writes!r}, no site of the residual stream and no "
            f"output of a sublayer. Pass one of such a place: {', '.join(known)}."
        )
    if dictionary.is_transcoder and place_of(dictionary.writes)[1] not in SUBLAYER_SITES.values():
        raise ValueError(
            f"{dictionary} reads elsewhere than in the residual that it gives back. Pass a "
            f"transcoder that writes what a sublayer adds, such as {layer_site(2, MLP_OUT)!r}."
        )


@spelled
def check_width(
    verb: str, dictionary: FeatureDictionary, width: int, site: str, there: Tensor
) -> None:
    """Refuse a dictionary of another width.

    Args:
        verb: "reads" or "writes".
        dictionary: The dictionary that is checked.
        width: How wide what it reads or writes is.
        site: Where that is.
        there: What stands there in the run.

    Raises:
        ValueError: If the widths differ.
    """
    if width != there.shape[-1]:
        raise ValueError(
            f"{dictionary} {verb} another width, {width}: this model has {there.shape[-1]} at "
            f"{site}. Pass one that was trained on this model."
        )


@spelled
def decoded(
    W: Float[Tensor, "d_sae d_out"], at: Tensor, features: Tensor, acts: Tensor, rows: int
) -> Float[Tensor, "row d_out"]:
    """Σ z d at every position, in float64, without b_dec.

    Args:
        W: The decoder, one row per feature.
        at: The row of every activation.
        features: The number of each feature.
        acts: The value of each activation.
        rows: How many rows there are.

    Returns:
        The sums, row by row.
    """
    found = torch.zeros(rows, W.shape[-1], dtype=torch.float64, device=acts.device)
    size = max(1, CHUNK_BYTES // (8 * W.shape[-1]))
    for start in range(0, len(at), size):
        cut = slice(start, start + size)
        # Many features fire at one position, and their rows are summed there.
        found.index_add_(0, at[cut], W[features[cut]].double() * acts[cut, None].double())
    return found


def _short(name: str) -> str:
    """A model's name without its owner; TransformerLens calls the smallest GPT-2 "gpt2"."""
    found = name.rpartition("/")[2].lower()
    return found.removesuffix("-small") if found.startswith("gpt2") else found
