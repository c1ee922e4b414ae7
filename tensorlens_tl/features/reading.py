"""What the features of a dictionary are at their site in one run, and what they leave out.

    x_p = Σ_f z_pf d_f + b_dec + ε_p,     times σ_p, plus μ_p, where the dictionary normalises

The error ε is what this equation says it is, computed in float64. So it is exact for every
dictionary, however bad.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..graph import Node, resid_site, site_parts
from ..operator import Capture, FrozenTransformer
from .dictionary import CHUNK_BYTES, FeatureDictionary


@dataclass(frozen=True, eq=False)
class Reading:
    """The features of one dictionary in one run.

    Attributes:
        dictionary: The SAE that is read.
        layer: The number of the block that its site names.
        place: The site within the block: "pre", "mid" or "post".
        index: The number of its residual site in the run.
        hook: The hook point of that site.
        at: The position of every active feature, as an index of batch · pos.
        features: The number of every active feature.
        acts: The activation of each.
        error: What the dictionary leaves out [batch, pos, d_model].
        unscale: What a reconstruction was multiplied by [batch · pos].
        shift: What was added to it in every dimension [batch · pos].
        n_real: The number of real tokens of all prompts.
    """

    dictionary: FeatureDictionary
    layer: int
    place: str
    index: int
    hook: str
    at: Int[Tensor, " n"]
    features: Int[Tensor, " n"]
    acts: Float[Tensor, " n"]
    error: Float[Tensor, "batch pos d_model"]
    unscale: Float[Tensor, " batch_pos"]
    shift: Float[Tensor, " batch_pos"]
    n_real: int

    @classmethod
    def of(
        cls, dictionary: FeatureDictionary, capture: Capture, operator: FrozenTransformer
    ) -> Reading:
        """Read the features of a run.

        Args:
            dictionary: An SAE of a residual site.
            capture: The captured run.
            operator: The operator of that run.

        Returns:
            All features that fire at real tokens, and the error.

        Raises:
            ValueError: If the dictionary is of another model, width or site.
        """
        layer, place = site_of(dictionary, capture)
        index = operator.site_index(dictionary.site)
        x = state_at(operator, capture, index)
        real = capture.frame.real.flatten()
        rows = x.flatten(0, 1)[real]
        where = real.nonzero().flatten()
        at, features, acts = dictionary.sparse(rows)
        norm = dictionary.normed(rows.double())
        unscale = x.new_ones(len(real), dtype=torch.float64)
        shift = torch.zeros_like(unscale)
        for whole, part in ((unscale, norm.unscale), (shift, norm.shift)):
            whole[real] = part.flatten() if isinstance(part, Tensor) else part
        at = where[at]
        found = decoded(dictionary, at, features, acts, len(real))
        found = (found + dictionary.b_dec.to(found)) * unscale[:, None] + shift[:, None]
        error = (x.flatten(0, 1).double() - found) * real[:, None]
        return cls(
            dictionary,
            layer,
            place,
            index,
            operator.sites[index],
            at,
            features,
            acts,
            error.view_as(x).to(x),
            unscale.to(x),
            shift.to(x),
            len(rows),
        )

    @property
    def site(self) -> str:
        """The site in short, such as "L2.pre"."""
        return f"L{self.layer}.{self.place}"

    def node(self, feature: int) -> Node:
        """The node of a feature."""
        return Node("feature", self.layer, feature, self.place)

    def constant(self, name: str) -> Node:
        """The node of a constant of the dictionary."""
        return Node("constant", self.layer, name=f"{self.place}.{name}")

    @property
    def error_node(self) -> Node:
        """The node of what the dictionary leaves out."""
        return Node("error", self.layer, name=self.place)

    @cached_property
    def spots(self) -> tuple[Int[Tensor, " row"], Int[Tensor, " n"]]:
        """The rows of a table, pos · d_sae + feature in order; and the row of every activation."""
        n_pos = self.error.shape[1]
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
        if self.index > len(operator.steps):
            raise ValueError(
                f"{self.dictionary} comes after the target's site. Pass an SAE of that site or one "
                "before it."
            )

    def beside(
        self, covectors: Float[Tensor, "*many batch pos d_model"]
    ) -> dict[Node, Float[Tensor, "*many batch pos"]]:
        """⟨covector, what stands beside the features⟩: b_dec, the mean if any, and the error.

        Args:
            covectors: Gradients of targets at the site.

        Returns:
            The products at every position, by node.
        """
        g, shape = covectors, self.error.shape[:2]
        unscale, shift = self.unscale.view(shape), self.shift.view(shape)
        found = {self.constant("b_dec"): unscale * (g @ self.dictionary.b_dec.to(g))}
        if self.dictionary.norm == "layer_norm":
            found[self.constant("mean")] = shift * g.sum(-1)
        return found | {self.error_node: (g * self.error).sum(-1)}

    def shares(self, covectors: Float[Tensor, "*many batch pos d_model"]) -> Tensor:
        """⟨covector, z d⟩ of every active feature: one gather and one product per chunk.

        Args:
            covectors: Gradients of targets at the site.

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
        return found * (self.acts * self.unscale[self.at])


def site_of(dictionary: FeatureDictionary, capture: Capture) -> tuple[int, str]:
    """Find the residual site of a dictionary, and check that it fits the model.

    Args:
        dictionary: An SAE of a residual site.
        capture: The captured run.

    Returns:
        The block and the place that the site names.

    Raises:
        ValueError: If the dictionary is of another model, width or site.
    """
    ours, theirs = _short(capture.model_name), _short(dictionary.model_name)
    if ours and theirs and ours != theirs:
        raise ValueError(
            f"The {dictionary.architecture} dictionary was trained on {dictionary.model_name!r}, "
            f"and this run is of {capture.model_name!r}. Pass one of this model, or load it with "
            "config={'model_name': ''} if the names mean the same."
        )
    layer, place = site_parts(dictionary.site)
    if layer < 0 or dictionary.is_transcoder:
        reads = f"reads {dictionary.site!r}"
        raise ValueError(
            f"{dictionary} {reads}, which is no site of the residual stream that it gives back. "
            f"Pass an SAE of such a site, such as {resid_site(2, 'pre')!r}."
        )
    width = capture.resid_final.shape[-1]
    if dictionary.d_in != width:
        raise ValueError(
            f"{dictionary} is of another width: this model has {width} at {dictionary.site}. Pass "
            "an SAE that was trained on this model."
        )
    return layer, place


def state_at(
    operator: FrozenTransformer, capture: Capture, index: int
) -> Float[Tensor, "batch pos d_model"]:
    """What stands at a residual site of a run.

    Args:
        operator: The operator of the run.
        capture: The captured run.
        index: The number of the site.

    Returns:
        The residual in the dtype of the operator.
    """
    found = operator.steps[index].state if index < len(operator.steps) else capture.resid_final
    return capture.frame.cast(found)


def decoded(
    dictionary: FeatureDictionary, at: Tensor, features: Tensor, acts: Tensor, rows: int
) -> Float[Tensor, "row d_out"]:
    """Σ z d at every position, in float64, without b_dec.

    Args:
        dictionary: The dictionary of the features.
        at: The row of every activation.
        features: The number of each feature.
        acts: The value of each activation.
        rows: How many rows there are.

    Returns:
        The sums, row by row.
    """
    W = dictionary.W_dec
    found = torch.zeros(rows, W.shape[-1], dtype=torch.float64, device=acts.device)
    size = max(1, CHUNK_BYTES // (8 * W.shape[-1]))
    for start in range(0, len(at), size):
        cut = slice(start, start + size)
        found.index_add_(0, at[cut], W[features[cut]].double() * acts[cut, None].double())
    return found


def _short(name: str) -> str:
    """A model's name without its owner; TransformerLens calls the smallest GPT-2 "gpt2"."""
    found = name.rpartition("/")[2].lower()
    return found.removesuffix("-small") if found.startswith("gpt2") else found
