"""Models of pictures and sounds in a Bridge.

An encoder of pictures gets pixels, has a row per patch, and reads classes at the row of [CLS]. The
embeddings module tells such a model: it has patches and a [CLS] token. A spectrogram is a picture
whose rows are frequencies and whose columns are times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..checks import kind_of
from ..graph import SPECIAL_ROWS
from ..maps import NormWeights
from ..operator import ClassNames, Prompts
from ..readers import ModuleTree, Read
from ..sublayers import PooledHead, UnembedWeights
from .bridge import BridgeAdapter
from .tokens import check_arguments
from .tokens import each_prompt as each_text


def embeddings_of(model: Any) -> Any:
    """The module that makes rows of patches, of a host or of the model inside; None for another."""
    modules = model.named_modules()
    if hasattr(model, "original_model"):
        tree = ModuleTree.of(model)
        modules = tree.inner if "patch_embeddings" in tree.by_end else ()
    for _, module in modules:
        if "patch_embeddings" not in module._modules:
            continue
        if {"cls_token", "position_embeddings"} <= {*module._modules, *module._parameters}:
            return module
    return None


def random_input(model: Any) -> Float[Tensor, "1 ..."]:
    """A picture or a spectrogram of random numbers, of the size that a model reads."""
    embeddings = embeddings_of(model)
    weight = embeddings.cls_token
    generator = torch.Generator().manual_seed(0)
    shape = (1, *_channels(embeddings), *_size(embeddings))
    return torch.randn(shape, generator=generator, device="cpu").to(weight)


def _size(embeddings: Any) -> tuple[int, int]:
    """The last two axes of what a model reads: rows and columns, or times and frequencies."""
    if (size := getattr(embeddings, "image_size", None)) is not None:
        return tuple(size)
    return embeddings.config.max_length, embeddings.config.num_mel_bins


def _channels(embeddings: Any) -> tuple[int, ...]:
    """The axis of channels of what a model reads; a spectrogram has none."""
    if hasattr(embeddings, "image_size"):
        return (embeddings.patch_embeddings.projection.in_channels,)
    return ()


class PictureAdapter(BridgeAdapter):
    """A Bridge around a model of pictures, or of spectrograms."""

    forbidden = (*BridgeAdapter.forbidden, "bool_masked_pos", "attention_mask")
    read_at, of_pictures = 0, True

    def __init__(self, model: Any):
        self.embeddings = embeddings_of(model)
        super().__init__(model)

    @property
    def headless(self) -> bool:
        return getattr(self.model, "unembed", None) is None

    @property
    def tokenizer(self) -> Any:
        """The names of the classes, in the place of a tokenizer's words."""
        names = self.model.original_model.config.id2label
        return None if self.headless else ClassNames([names[i] for i in sorted(names)])

    def unembed_weights(self) -> UnembedWeights:
        if not self.headless:
            found, own = super().unembed_weights(), getattr(self.model, "classifier_ln", None)
            if own is None:
                return found
            # AST: the norm of the mean of the rows before the patches.
            norm = cast(NormWeights, self.norm_weights(own))
            return replace(found, head=PooledHead(norm, len(self.special)))
        weight = self.embeddings.cls_token  # what it returns is read as it is
        return UnembedWeights(torch.eye(weight.shape[-1], dtype=weight.dtype).to(weight), None)

    # --- What enters block 0

    @property
    def source_hooks(self) -> dict[str, str]:
        return {}  # no hook point shows a part; see points

    @property
    def sources(self) -> tuple[str, ...]:
        special = [part for part in SPECIAL_ROWS if hasattr(self.embeddings, part)]
        return (*special, "patch", "pos_embed")

    def sources_of(
        self, seen: Mapping[str, Tensor], prompts: Prompts, kwargs: Mapping[str, Any]
    ) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        patches, own = super().sources_of(seen, prompts, kwargs)["patch"], self.embeddings
        batch, n = len(patches), len(self.special)
        zeros = patches.new_zeros(batch, n + patches.shape[1], patches.shape[2])
        found = {name: zeros.clone() for name in self.sources}
        for row, name in enumerate(self.sources[:n]):
            found[name][:, row] = getattr(own, name)[0, 0].to(patches)
        found["patch"][:, n:] = patches
        positions = own.position_embeddings
        if kwargs.get("interpolate_pos_encoding"):  # by the model's own function
            positions = own.interpolate_pos_encoding(zeros, *prompts.given.shape[-2:])
        found["pos_embed"] += positions.to(patches)
        return found

    # --- What is run

    def prepare(self, inputs: Any, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Prompts]:
        if isinstance(inputs, Prompts):
            return dict(kwargs), inputs
        name = "pixel_values" if _channels(self.embeddings) else "input_values"
        kwargs = dict(kwargs)
        if isinstance(inputs, Mapping):
            inputs = inputs.get(name, inputs)
        elif inputs is None:
            inputs = kwargs.pop(name, None)
        hosts = self.model, self.model.original_model
        check_arguments(kwargs, (*self.forbidden, name), hosts)
        return kwargs, self.describe(inputs, bool(kwargs.get("interpolate_pos_encoding")))

    def describe(self, inputs: Any, any_size: bool = False) -> Prompts:
        """Check pictures or spectrograms, and name their rows.

        Args:
            inputs: Pixel values [batch, channel, row, column], or of one picture without the first
                axis. Spectrograms are [batch, time, frequency].
            any_size: Whether position embeddings are interpolated, so that any size is read.

        Returns:
            The pictures as the model runs them, and a name for every row.

        Raises:
            ValueError: If they are no such numbers, or of another size than the model reads.
        """
        expected = (*_channels(self.embeddings), *_size(self.embeddings))
        axes = "channel, row, column" if len(expected) == 3 else "time, frequency"
        what = f"numbers [batch, {axes}], as the model's own processor makes them"
        if isinstance(inputs, list | tuple) and all(isinstance(one, Tensor) for one in inputs):
            same = len({one.shape for one in inputs}) == 1
            inputs = torch.stack(list(inputs)) if same else inputs
        if not isinstance(inputs, Tensor) and hasattr(inputs, "__array__"):
            inputs = torch.as_tensor(getattr(inputs, "__array__")())  # noqa: B009
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            kind = f"{inputs.dtype}" if isinstance(inputs, Tensor) else kind_of(inputs)
            raise ValueError(f"The input is {kind}, and {self.name} reads pictures. Pass {what}.")
        values = inputs[None] if inputs.ndim == len(expected) else inputs
        shape = tuple(values.shape[1:])
        any_size &= expected[-1] == expected[-2]  # only square tables are interpolated
        fits = shape == expected or (any_size and shape[:-2] == expected[:-2])
        if values.ndim != len(expected) + 1 or not len(values) or not fits:
            raise ValueError(
                f"The input has shape {list(inputs.shape)}, and {self.name} reads "
                f"[batch, {', '.join(map(str, expected))}]. Pass {what}."
            )
        rows, columns = self.grid(values)
        patches = [f"patch[{i},{j}]" for i in range(rows) for j in range(columns)]
        names, n = (*self.special, *patches), len(self.special) + len(patches)
        values = values.detach().to(self.embeddings.cls_token)
        spans = ((0, n),) * len(values)
        return Prompts(None, spans, (names,) * len(values), values)

    @property
    def special(self) -> list[str]:
        """Names of the rows before the patches."""
        return [name for part, name in SPECIAL_ROWS.items() if hasattr(self.embeddings, part)]

    def patch_rows(self, prompt: Tensor) -> range:
        """Positions of the patches of one picture."""
        rows, columns = self.grid(prompt[None])
        return range(len(self.special), len(self.special) + rows * columns)

    def n_pos_of(self, given: Tensor) -> int:
        return self.patch_rows(given[0]).stop

    @property
    def patch_width(self) -> int:
        """Number of pixels from a patch's left to its right."""
        return self.embeddings.patch_embeddings.projection.kernel_size[-1]

    def pixels_of(
        self, masked: Bool[Tensor, "picture pos"], pictures: Float[Tensor, "picture ..."]
    ) -> Bool[Tensor, "picture ..."]:
        """Tell which pixels some patches are made of.

        Args:
            masked: True at the rows of these patches.
            pictures: The pictures, or spectrograms, as the model reads them.

        Returns:
            True at their pixels, as [picture, 1, row, column], or [picture, time, frequency].
        """
        conv, turned = self.embeddings.patch_embeddings.projection, pictures.ndim == 3
        size = pictures.shape[-1:-3:-1] if turned else pictures.shape[-2:]
        patches = masked[:, len(self.special) :].unflatten(1, self.grid(pictures))[:, None]
        whole = torch.ones(1, 1, *conv.kernel_size).to(pictures)
        covered = nn.functional.conv_transpose2d(patches.to(pictures), whole, stride=conv.stride)
        found = torch.zeros(len(masked), 1, *size, dtype=torch.bool, device=pictures.device)
        found[..., : covered.shape[2], : covered.shape[3]] = covered > 0
        return found[:, 0].mT if turned else found

    def grid(self, values: Tensor) -> tuple[int, int]:
        """How many rows and columns of patches there are."""
        conv = self.embeddings.patch_embeddings.projection
        turned = values.ndim == 3  # a spectrogram, whose frequencies become rows
        size = values.shape[-1:-3:-1] if turned else values.shape[-2:]
        parts = zip(size, conv.kernel_size, conv.stride, strict=True)
        rows, columns = ((n - kernel) // stride + 1 for n, kernel, stride in parts)
        return rows, columns

    def points(self, attention: tuple[str, ...] = ("pattern",)) -> dict[Read, nn.Module]:
        found = super().points(attention)
        found[None, "patch"] = self.embeddings.patch_embeddings
        if (None, "normalized") in found:  # a classifier is given one row of it
            found[None, "normalized"] = self.model.ln_final
        return found

    def mask(self, tokens: Tensor, kwargs: Mapping[str, Any]) -> None:
        return None


def added_token(adapter: Any, prompt: Any, **how: Any) -> str | None:
    """What the host or the tokenizer puts in front of a prompt, as a convention tells it.

    Args:
        adapter: Adapter of the model.
        prompt: One prompt of :func:`each_prompt`.
        **how: ``prepend_bos``, as for the capture.

    Returns:
        The token; "" where none is put there, None where the prompt is not a text.
    """
    return adapter.prepare(prompt, how)[1].added if isinstance(prompt, str) else None


def each_prompt(prompts: Any, tokenizer: Any, mask: Any = None, name: str = "prompts") -> list[Any]:
    """List pictures or sounds one by one; and texts and ids as ``tokens.each_prompt`` does.

    Args:
        prompts: Numbers [batch, ...], or a list of pictures; or texts and token ids.
        tokenizer: Tokenizer of the model, or None.
        mask: Attention mask of ids, or None.
        name: Name of the argument in error messages.

    Returns:
        One picture, text or tensor of ids per prompt.
    """
    rows = prompts
    if isinstance(rows, Mapping):
        rows = next((rows[n] for n in ("pixel_values", "input_values") if n in rows), None)
    if isinstance(rows, Tensor) and not rows.is_floating_point():
        rows = None
    if isinstance(rows, list | tuple | Tensor) and len(rows) and all(map(_is_picture, rows)):
        return list(rows)
    return each_text(prompts, tokenizer, mask, name)


def _is_picture(given: Any) -> bool:
    return isinstance(given, Tensor) and given.is_floating_point() and given.ndim > 1
