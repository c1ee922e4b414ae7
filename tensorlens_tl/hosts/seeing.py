"""Models of texts that also see or hear: rows of pictures, films and sounds replace tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..operator import Prompts, patch_names
from ..readers import norm_eps
from ..refusals import UnsupportedArchitectureError, refusal
from .bridge import BridgeAdapter
from .tokens import unpacked


@dataclass(frozen=True)
class Sense:
    """What some models read beside text, and Hugging Face's names of it.

    Attributes:
        row: What one of its rows is called.
        argument: The model's argument that holds it.
        function: The function of a model that makes its rows.
        token: The option with the id of the tokens it replaces, without "_id" or "_index".
        sizes: Arguments that tell its rows and columns; of a film, its times before them.
    """

    row: str
    argument: str
    function: str
    token: str
    sizes: tuple[str, ...] = ()

    def token_id(self, model: Any) -> int | None:
        """Id of the token that a row replaces; None if the model has none."""
        config = getattr(getattr(model, "original_model", model), "config", None)
        ids = (getattr(config, f"{self.token}_{end}", None) for end in ("id", "index"))
        return next((i for i in ids if i is not None), None)


PICTURE = Sense(
    "patch",
    "pixel_values",
    "get_image_features",
    "image_token",
    ("image_grid_thw", "image_sizes"),
)
FILM = Sense(
    "film", "pixel_values_videos", "get_video_features", "video_token", ("video_grid_thw",)
)
SOUND = Sense("sound", "input_features", "get_audio_features", "audio_token")


def senses(model: Any) -> tuple[Sense, ...]:
    """What a host, or the model inside, reads beside text, as far as it shows the rows."""
    found = [s for s in (PICTURE, FILM, SOUND) if s.token_id(model) is not None]
    return tuple(s for s in found if hasattr(*_maker(model, s)))


def _maker(model: Any, sense: Sense) -> tuple[Any, str]:
    """What makes the rows of a sense: a module of Hugging Face's model, and its method."""
    inner = getattr(model, "original_model", model)
    seeing = getattr(inner, "model", inner)
    if sense is SOUND and not hasattr(seeing, sense.function):  # Qwen2-Audio
        return getattr(seeing, "multi_modal_projector", None), "forward"
    return seeing, sense.function


def tower_norms(bridge: Any) -> list[Any]:
    """Norms in the parts of a Bridge that see or hear, which it may compute by itself."""
    towers = (getattr(bridge, f"{part}_encoder", None) for part in ("vision", "audio"))
    modules = (module for tower in towers if tower is not None for module in tower.modules())
    return [module for module in modules if hasattr(module, "use_native_layernorm_autograd")]


def _like_the_text(norm: Any) -> bool:
    """Whether a Bridge computes a norm with the ε or the offset of the text's norms."""
    cfg = norm.config
    if norm.use_native_layernorm_autograd or getattr(cfg, "layer_norm_folding", False):
        return False
    shifted = getattr(cfg, "rmsnorm_uses_offset", False)
    return norm_eps(norm) != cfg.eps or getattr(norm, "uses_weight_offset", shifted)


class SeeingAdapter(BridgeAdapter):
    """A Bridge around a model of texts that sees or hears: rows replace tokens.

    The source "patch" holds the rows of pictures, films and sounds.
    """

    def __init__(self, model: Any):
        super().__init__(model)
        self.senses = senses(self.model)
        self.rows: dict[Sense, list[Tensor]] = {}
        self.later: dict[Sense, list[Tensor]] = {}
        self.inside = False

    def given(self, kwargs: Mapping[str, Any]) -> list[Sense]:
        """The senses that the arguments of a run speak to."""
        return [sense for sense in self.senses if kwargs.get(sense.argument) is not None]

    def prepare(self, inputs: Any, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Prompts]:
        self.rows, self.later = {}, {}
        inputs, kwargs = unpacked(inputs, kwargs, (self.model, self.model.original_model))
        shown = [sense.argument for sense in self.given(kwargs)]
        for name in (*(s.argument for s in (PICTURE, FILM, SOUND)), "audio_values"):
            if kwargs.get(name) is not None and name not in shown:
                why = "no function of the model shows the rows that this makes"
                raise UnsupportedArchitectureError(refusal(f"{self.architecture} with {name}", why))
        if shown and any(map(_like_the_text, tower_norms(self.model))):
            why = "its Bridge takes ε and offset of the text's norms for those of this input"
            remedy = "Capture the Hugging Face model itself, or what tensorlens_tl.wrap returns."
            what = f"{self.architecture} with {shown[0]}"
            raise UnsupportedArchitectureError(refusal(what, why, remedy))
        marks = {k: kwargs.pop(k) for k in ("token_type_ids",) if k in kwargs}  # which see ahead
        kwargs, prompts = super().prepare(inputs, kwargs)
        for sense in self.given(kwargs):
            if not self._at(sense, prompts.given).any():
                self._misplaced(sense, "no token of the prompt stands for it")
        return kwargs | marks, prompts

    def _misplaced(self, sense: Sense, why: str) -> None:
        raise ValueError(
            f"{sense.argument} is given, but {why} (id {sense.token_id(self.model)}). Pass the "
            "prompt that the model's own processor makes."
        )

    def run(self, inputs: Any, kwargs: Mapping[str, Any]) -> Tensor:
        with ExitStack() as watched:
            for sense in self.given(kwargs):
                watched.enter_context(self._watched(sense, inputs, kwargs))
            return super().run(inputs, kwargs)

    @contextmanager
    def _watched(self, sense: Sense, ids: Tensor, kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Keep the rows of a sense when the model makes them."""
        maker, name = _maker(self.model, sense)
        real, before = getattr(maker, name), vars(maker).get(name)

        def see(*args: Any, **options: Any) -> Any:
            inside, self.inside = self.inside, True
            try:
                found = real(*args, **options)
            finally:
                self.inside = inside
            if inside:  # Qwen3-VL makes the rows of a film by the function of pictures
                return found
            rows = getattr(found, "pooler_output", found)
            parts = [rows] if isinstance(rows, Tensor) and rows.ndim == 2 else rows
            if name == "forward":
                parts = self._unpadded(parts, kwargs)
            self.rows[sense] = [part.detach().flatten(0, -2) for part in parts]
            later = getattr(found, "deepstack_features", None) or ()
            self.later[sense] = [torch.cat(tuple(part)).detach() for part in later]
            made, places = sum(map(len, self.rows[sense])), int(self._at(sense, ids).sum())
            if made != places:
                self._misplaced(sense, f"{places} tokens of the prompt stand for its {made} rows")
            return found

        vars(maker)[name] = see
        try:
            yield
        finally:
            del vars(maker)[name]
            if before is not None:
                vars(maker)[name] = before

    def _unpadded(self, rows: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Rows of Qwen2-Audio's sounds without those that pad them to one length."""
        model = self.model.original_model.model
        lengths = kwargs["feature_attention_mask"].sum(-1)
        lengths = model.audio_tower._get_feat_extract_output_lengths(lengths)[1].tolist()
        return [sound[:n] for sound, n in zip(rows, lengths, strict=True)]

    def _at(self, sense: Sense, ids: Tensor) -> Bool[Tensor, "batch pos"]:
        """Where the rows of a sense stand."""
        at = ids == sense.token_id(self.model)
        if sense is FILM and not at.any():  # GLM-4V's stand where those of pictures would
            at = ids == PICTURE.token_id(self.model)
        return at

    def _placed(
        self, rows: Mapping[Sense, Tensor], ids: Tensor, like: Tensor
    ) -> Float[Tensor, "batch pos d_model"]:
        """Rows where their tokens are, and 0 elsewhere."""
        placed = torch.zeros_like(like)
        for sense, own in rows.items():
            placed = placed.masked_scatter(self._at(sense, ids)[..., None], own.to(like))
        return placed

    def sources_of(self, seen, prompts, kwargs):
        parts = super().sources_of(seen, prompts, kwargs)
        if not self.rows:
            return parts
        embed, ids = parts.pop("embed"), prompts.given
        rows = {sense: torch.cat(own) for sense, own in self.rows.items()}
        patch = self._placed(rows, ids, embed)
        for sense in rows:
            embed = embed.masked_fill(self._at(sense, ids)[..., None], 0)
        return {"embed": embed, "patch": patch, **parts}

    def added_after(self, layer: int, prompts: Prompts, like: Tensor) -> tuple[str, Tensor] | None:
        rows = {s: own[layer] for s, own in self.later.items() if layer < len(own)}
        return (f"L{layer}.deepstack", self._placed(rows, prompts.given, like)) if rows else None

    def described(self, prompts: Prompts, kwargs: Mapping[str, Any]) -> Prompts:
        # "patch[row,column]", "film[time,row,column]" and "sound[row]"; and, where a prompt has
        # several of these, with its number in front.
        ids, strings = prompts.given, [list(own) for own in prompts.strings]
        for sense, parts in self.rows.items():
            counted = iter(enumerate(parts))
            for at, (start, stop), own in zip(
                self._at(sense, ids).tolist(), prompts.spans, strings, strict=True
            ):
                places = [i for i, here in enumerate(at[start:stop]) if here]
                names = _names(sense, places, counted, kwargs)
                for i, name in zip(places, names, strict=True):
                    own[i] = name
        return replace(prompts, strings=tuple(map(tuple, strings)))

    def not_recomputed(self, kwargs: Mapping[str, Any]) -> str:
        ahead = kwargs.get("token_type_ids") is not None
        return "rows of a picture see later ones" if ahead else ""

    def score_weights(self, n_pos, kwargs=None):
        kwargs = kwargs or {}
        if cause := self.not_recomputed(kwargs):
            return cause
        rope = getattr(self.model.original_model.config.get_text_config(), "rope_parameters", {})
        if self.given(kwargs) and "mrope_section" in (rope or {}):
            return "positions in a picture have three axes"
        return super().score_weights(n_pos, kwargs)


def _names(
    sense: Sense,
    places: list[int],
    counted: Iterator[tuple[int, Tensor]],
    kwargs: Mapping[str, Any],
) -> list[str]:
    """Name the rows of a sense in one prompt.

    Args:
        sense: What the rows are of.
        places: Positions of its rows in the prompt.
        counted: What is seen or heard in the batch, with its number; as much as the prompt has is
            taken.
        kwargs: Arguments of the run.

    Returns:
        A name per place.
    """
    found: list[tuple[int, list[Any]]] = []  # number of rows; times, rows and columns
    if sense is SOUND:  # one ends where other tokens follow
        starts = [i for i, place in enumerate(places) if place - 1 not in places]
        stops = [*starts[1:], len(places)]
        found = [(stop - start, [0, 0]) for start, stop in zip(starts, stops, strict=True)]
    while sum(n for n, _ in found) < len(places):
        number, rows = next(counted)
        size = next((kwargs[name][number].tolist() for name in sense.sizes if name in kwargs), None)
        found.append((len(rows), size or ([0, 0] if sense is FILM else [1, 1])))
    names = []
    for i, (n, (*times, height, width)) in enumerate(found):
        first = f"{i}," if len(found) > 1 else ""
        frames = [f"{first}{t}," for t in range(times[0])] if sense is FILM and times else [first]
        for frame in frames:
            names += patch_names(n // len(frames), height, width, frame, sense.row)
    return names
