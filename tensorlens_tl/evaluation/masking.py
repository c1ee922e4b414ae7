"""Runs of the real model with some of a prompt's tokens masked: deleted, replaced, or made average.

    delete   the token is removed, and later tokens take earlier positions
    token    the id of a mask token replaces the token's id
    mean     the mean of W_E's rows replaces the token's embedding, not that of its position

Of a picture, patches are masked by their pixels, before the model reads them. [CLS] never is.

    zero     the pixels become 0 before normalization: black, whose value ``black`` tells
    mean     the pixels become the mean of the picture, channel by channel
    blur     the pixels become those of the picture under a Gaussian as wide as a patch

The model was trained on none of these prompts. Results depend on the masking that is chosen, so
they name it. Prompts of one length run together, never padded. The beginning-of-sequence token is
never masked. The number that is read belongs to the prediction after the last token.

A run takes three steps: 1. group the wanted masked prompts by length; 2. run each batch masked;
3. keep all metrics of every run, so that no set of tokens is run twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..attribution import mean_embedding
from ..checks import progress_bar
from ..hosts import Adapter
from ..readers import alone, in_this_thread
from ..recording import hooked

MASKINGS = ("delete", "token", "mean")
OF_PICTURES = ("zero", "mean", "blur")

METRICS = ("probability", "log_odds", "logit", "logit_diff", "agreement")
"""Numbers of the target after the masked prompt. "log_odds" is log p / (1 − p), its logit less all
others'; "logit_diff" is its logit less that of one foil; "agreement" is 1 where the target is the
prediction of the model, else 0."""


@dataclass(frozen=True, eq=False)
class Masking:
    """How tokens are masked.

    Attributes:
        kind: One of :data:`MASKINGS`, or of :data:`OF_PICTURES`.
        token: Id of the mask token, for "token".
        embedding: Mean embedding [d_model], for "mean".
        black: Value of a black pixel in every channel, for "zero".
    """

    kind: str
    token: int | None = None
    embedding: Float[Tensor, " d_model"] | None = None
    black: Float[Tensor, " channel"] | None = None

    @classmethod
    def of(
        cls, kind: str, adapter: Adapter, token: str | int | None = None, black: Any = None
    ) -> Masking:
        """Prepare a masking for a model.

        Args:
            kind: One of :data:`MASKINGS`, or of :data:`OF_PICTURES` for a model of pictures.
            adapter: Adapter of the model.
            token: Mask token or id, for "token". By default, the first that the tokenizer has of
                its mask, unknown, padding and end-of-sequence tokens.
            black: For "zero", what 0 is after normalization: a number, or one per channel.

        Returns:
            The masking with its token id or mean embedding.

        Raises:
            ValueError: If there is no such kind, or no such token.
        """
        known = OF_PICTURES if adapter.of_pictures else MASKINGS
        if kind not in known:
            there = " for pictures" if adapter.of_pictures else ""
            raise ValueError(
                f"masking={kind!r} does not exist{there}. Use one of {', '.join(known)}."
            )
        if adapter.of_pictures:
            return cls(kind, black=_black(black) if kind == "zero" else None)
        if kind == "token":
            return cls(kind, _mask_token(adapter, token))
        if kind == "mean":
            return cls(kind, embedding=_mean_embedding(adapter))
        return cls(kind)


def maskable(adapter: Any, prompt: Tensor) -> range:
    """Rows of one prompt that may be masked: the patches of a picture, or all tokens.

    Args:
        adapter: Adapter of the model.
        prompt: Token ids [pos], whose first may be a special one that is never masked; or a
            picture.

    Returns:
        The rows, of which the last is the prompt's last.
    """
    if adapter.of_pictures:
        return adapter.patch_rows(prompt)
    bos = getattr(adapter.tokenizer, "bos_token_id", None)
    return range(int(bos is not None and int(prompt[0]) == bos), len(prompt))


def _black(given: Any) -> Float[Tensor, " channel"]:
    try:
        found = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        found = torch.tensor([torch.nan])
    if found.ndim > 1 or not found.isfinite().all():
        raise ValueError(
            f"black={given!r} is not what 0 is after normalization. Pass one number per channel: "
            "−mean / std of the model's image processor."
        )
    return found.flatten()


def _filled(pictures: Tensor, masking: Masking, width: int) -> Tensor:
    """What masked pixels become, for every pixel of some pictures."""
    if masking.black is not None:
        return masking.black.to(pictures)[:, None, None].expand(*pictures.shape[1:])
    if masking.kind == "mean":
        return pictures.mean((-2, -1), keepdim=True).expand_as(pictures)
    rows, columns = (_gaussian(n, width).to(pictures) for n in pictures.shape[-2:])
    return rows @ pictures @ columns.T


def _gaussian(n: int, width: int) -> Float[Tensor, "n n"]:
    """Weights of every neighbour in every blurred number; they sum to 1, also at the border."""
    at = torch.arange(n, dtype=torch.float64, device="cpu")
    weights = torch.exp(-((at[:, None] - at) ** 2) / (2 * width**2))
    return weights / weights.sum(1, keepdim=True)


def _mask_token(adapter: Adapter, token: str | int | None) -> int:
    tokenizer, d_vocab = adapter.tokenizer, adapter.cfg.d_vocab
    if isinstance(token, str):
        ids = [] if tokenizer is None else tokenizer.encode(token, add_special_tokens=False)
        unknown = getattr(tokenizer, "unk_token_id", None)
        if ids == [unknown] and token != getattr(tokenizer, "unk_token", None):
            raise ValueError(
                f"mask_token={token!r} is unknown to the tokenizer. Pass a known token, or an id."
            )
        if len(ids) != 1:
            raise ValueError(
                f"mask_token={token!r} is {len(ids)} tokens. Pass one token, or an id."
            )
        return int(ids[0])
    names = ("mask_token_id", "unk_token_id", "pad_token_id", "eos_token_id")
    known = (getattr(tokenizer, name, None) for name in names)
    found = token if token is not None else next((i for i in known if i is not None), None)
    if found is None:
        raise ValueError("The tokenizer has no mask token. Pass mask_token=, a token or an id.")
    if not 0 <= found < d_vocab:
        raise ValueError(
            f"mask_token={found} is outside the vocabulary. Pass an id from 0 to {d_vocab - 1}."
        )
    return int(found)


def _mean_embedding(adapter: Adapter) -> Tensor:
    weights = adapter.embed_weights()
    if weights is None:
        raise ValueError(
            f"masking='mean' needs W_E, which {adapter.name} does not show. Use 'delete' or "
            "'token'."
        )
    # A token whose row is not 0, as the padding token's often is.
    sizes = torch.linalg.vector_norm(weights.W_E.detach(), dim=-1).nan_to_num(0.0)
    ids, seen = sizes.argmax().view(1, 1), []
    point = adapter.points()[None, "embed"]
    look = hooked([(point, lambda x: seen.append(x.detach()))])
    with alone(adapter.model), torch.no_grad(), look:
        adapter.run(ids, adapter.all_real(ids))
    return mean_embedding(seen[0][0], ids[0], weights)


@torch.no_grad()
def end_logits(
    adapter: Any, ids: Int[Tensor, "row pos"], masked: Bool[Tensor, "row pos"], masking: Masking
) -> Float[Tensor, "row d_vocab"]:
    """Run masked prompts, and return the logits after the last token of each.

    Args:
        adapter: Adapter of the model.
        ids: Token ids without padding [row, pos], or pictures.
        masked: True where a token or a patch is masked [row, pos]. For "delete" the same number in
            every row, and never all.
        masking: How the tokens are masked.

    Returns:
        Logits [row, d_vocab] in the dtype of the model; only the last position is unembedded.
    """
    edits = []
    if adapter.of_pictures:
        filled = _filled(ids, masking, adapter.patch_width)
        return adapter.run(torch.where(adapter.pixels_of(masked, ids), filled, ids), {})
    if masking.kind == "delete":
        ids = ids[~masked].view(len(ids), -1)
    elif masking.token is not None:
        ids = ids.masked_fill(masked, masking.token)
    elif masking.embedding is not None:
        mean = masking.embedding
        point = adapter.points()[None, "embed"]
        edits.append((point, lambda x: torch.where(masked[..., None], mean.to(x), x)))
    with alone(adapter.model):
        last = adapter.model.unembed.register_forward_pre_hook(
            in_this_thread(lambda module, args: (args[0][:, -1:], *args[1:]))
        )
        try:
            with hooked(edits):
                return adapter.run(ids, adapter.all_real(ids))[:, -1]
        finally:
            last.remove()


@dataclass(eq=False)
class MaskedRuns:
    """Outcomes of masked prompts; each is run once, however many measures and methods ask for it.

    Attributes:
        adapter: Adapter of the model.
        prompts: Token ids, one tensor [pos] per prompt; or pictures.
        targets: Token id, or class, whose outcome is read, per prompt.
        foils: Token id whose logit "logit_diff" subtracts, per prompt.
        masking: How tokens are masked.
        batch_size: Number of masked prompts run at once.
        progress: Whether to show a progress bar on standard error after 2 s.
        runs: Number of masked prompts run so far.
    """

    adapter: Adapter
    prompts: Sequence[Int[Tensor, " _"]]
    targets: Sequence[int]
    foils: Sequence[int]
    masking: Masking
    batch_size: int = 64
    progress: bool = True
    runs: int = 0
    _known: dict[tuple[int, int], tuple[float, ...]] = field(default_factory=dict, repr=False)

    def need(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Run the masked prompts that were not run yet.

        Args:
            wanted: Pairs of a prompt's index and a set of masked positions, bit j for position j.
        """
        # 1. Only prompts with equally many tokens left run together: nothing is padded.
        missing = [key for key in dict.fromkeys(wanted) if key not in self._known]
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for prompt, masked in missing:
            length = maskable(self.adapter, self.prompts[prompt]).stop
            left = length - masked.bit_count() if self.masking.kind == "delete" else length
            groups.setdefault((length, left), []).append((prompt, masked))
        with progress_bar(f"masked by {self.masking.kind}", len(missing), self.progress) as bar:
            for (length, _), keys in groups.items():
                for start in range(0, len(keys), self.batch_size):
                    batch = keys[start : start + self.batch_size]
                    self._run(batch, length)
                    bar.update(len(batch))

    def _run(self, batch: list[tuple[int, int]], length: int) -> None:
        ids = torch.stack([self.prompts[prompt] for prompt, _ in batch])
        # 2. One batch, masked.
        bits = [[masked >> j & 1 for j in range(length)] for _, masked in batch]
        masked = torch.tensor(bits, dtype=torch.bool, device=ids.device)
        logits = end_logits(self.adapter, ids, masked, self.masking)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        both = [(self.targets[prompt], self.foils[prompt]) for prompt, _ in batch]
        both = torch.tensor(both, device=ids.device)
        target, (logit, foil) = both[:, 0], logits.gather(1, both).unbind(1)
        others = logits.scatter(1, target[:, None], -torch.inf).logsumexp(-1)
        log_odds = logit - others
        agreement = (logits.argmax(-1) == target).to(logit)
        found = torch.stack([log_odds.sigmoid(), log_odds, logit, logit - foil, agreement], 1)
        # 3. Every metric is kept, though one was asked for: the run is what costs.
        self._known |= zip(batch, map(tuple, found.tolist()), strict=True)
        self.runs += len(batch)

    def forget(self) -> None:
        """Forget all outcomes, to free their memory."""
        self._known.clear()

    def outcomes(self, prompt: int, metric: str, masked: Sequence[int]) -> list[float]:
        """Read a metric of one prompt under many sets of masked positions."""
        keys, column = [(prompt, one) for one in masked], METRICS.index(metric)
        self.need(keys)
        return [self._known[key][column] for key in keys]
