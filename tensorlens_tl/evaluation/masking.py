"""Runs of the real model with some of a prompt's tokens masked: deleted, replaced, or made average.

    delete   the token is left out and the rest closes up: later tokens take earlier positions
    token    its id is replaced by a mask token's
    mean     its embedding is replaced by the mean of W_E's rows; its position's embedding stays

Masking by any of them is a prompt the model was not trained on; which one is chosen changes the
numbers, so they are told together. Rows of one length run side by side, never padded. The
beginning-of-sequence token is never masked. What is read is the prediction after the last token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from ..attribution import mean_embedding
from ..hosts import Adapter, hooked

MASKINGS = ("delete", "token", "mean")

METRICS = ("probability", "log_odds", "logit", "logit_diff", "agreement")
"""Of the target after the masked prompt. Log-odds, log p / (1 − p), are its logit less all others';
"logit_diff" is its logit less one rival's; "agreement" is 1 where the target is the model's own
prediction, else 0."""


@dataclass(frozen=True, eq=False)
class Masking:
    """How tokens are masked.

    Attributes:
        kind: One of :data:`MASKINGS`.
        token: "token": the mask token's id.
        embedding: "mean": the mean embedding [d_model].
    """

    kind: str
    token: int | None = None
    embedding: Float[Tensor, " d_model"] | None = None

    @classmethod
    def of(cls, kind: str, adapter: Adapter, token: str | int | None = None) -> Masking:
        """A way of masking for a model.

        Args:
            kind: One of :data:`MASKINGS`.
            adapter: The model's.
            token: "token": a token or id; by default the tokenizer's mask token, or else its unknown,
                padding or end-of-sequence token, whichever it has first.

        Returns:
            The masking.

        Raises:
            ValueError: If there is no such kind, or no such token.
        """
        if kind not in MASKINGS:
            raise ValueError(f"no masking {kind!r}; expected one of {', '.join(MASKINGS)}")
        if kind == "token":
            return cls(kind, _mask_token(adapter, token))
        if kind == "mean":
            return cls(kind, embedding=_mean_embedding(adapter))
        return cls(kind)


def _mask_token(adapter: Adapter, token: str | int | None) -> int:
    tokenizer, d_vocab = adapter.tokenizer, adapter.cfg.d_vocab
    if isinstance(token, str):
        ids = [] if tokenizer is None else tokenizer.encode(token, add_special_tokens=False)
        unknown = getattr(tokenizer, "unk_token_id", None)
        if ids == [unknown] and token != getattr(tokenizer, "unk_token", None):
            raise ValueError(
                f"the tokenizer does not know the mask token {token!r}: pass a known one, or its id"
            )
        if len(ids) != 1:
            raise ValueError(
                f"the mask token {token!r} is {len(ids)} tokens, expected one: pass its id"
            )
        return int(ids[0])
    names = ("mask_token_id", "unk_token_id", "pad_token_id", "eos_token_id")
    known = (getattr(tokenizer, name, None) for name in names)
    found = token if token is not None else next((i for i in known if i is not None), None)
    if found is None or not 0 <= found < d_vocab:
        raise ValueError(
            f"expected a mask token from 0 to {d_vocab - 1}, got {found}: pass mask_token=, a token or id"
        )
    return int(found)


def _mean_embedding(adapter: Adapter) -> Tensor:
    weights = adapter.embed_weights()
    if weights is None:
        raise ValueError(
            f"masking 'mean' needs W_E, which {adapter.name} does not show: mask by 'delete' or 'token'"
        )
    ids, seen = torch.ones(1, 1, dtype=torch.long, device=weights.W_E.device), []
    point = adapter.points()[None, "embed"]
    with torch.no_grad(), hooked([(point, lambda x: seen.append(x.detach()))]):
        adapter.run(ids, all_real(adapter, ids))
    return mean_embedding(seen[0][0, 0], 1, weights)


def all_real(adapter: Adapter, ids: Int[Tensor, "row pos"]) -> dict[str, Any]:
    """What a host that would mask pad ids in token tensors must be told: that all are real."""
    return {} if adapter.mask(ids, {}) is None else {"attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def end_logits(
    adapter: Adapter, ids: Int[Tensor, "row pos"], masked: Bool[Tensor, "row pos"], masking: Masking
) -> Float[Tensor, "row d_vocab"]:
    """The model's logits after the last token of every prompt, some of its tokens masked.

    Args:
        adapter: The model's.
        ids: Token ids, no padding.
        masked: Which are masked; for "delete" equally many in every row, and never all.
        masking: How.

    Returns:
        Logits, in the model's dtype; only the last position is unembedded.
    """
    edits = []
    if masking.kind == "delete":
        ids = ids[~masked].view(len(ids), -1)
    elif masking.token is not None:
        ids = ids.masked_fill(masked, masking.token)
    elif masking.embedding is not None:
        mean = masking.embedding
        point = adapter.points()[None, "embed"]
        edits.append((point, lambda x: torch.where(masked[..., None], mean.to(x), x)))
    last = adapter.model.unembed.register_forward_pre_hook(
        lambda module, args: (args[0][:, -1:], *args[1:])
    )
    try:
        with hooked(edits):
            return adapter.run(ids, all_real(adapter, ids))[:, -1]
    finally:
        last.remove()


@dataclass(eq=False)
class MaskedRuns:
    """Outcomes of masked prompts, each run once however many measures and methods ask for it.

    Attributes:
        adapter: The model's.
        prompts: Token ids, one tensor [pos] per prompt.
        targets: The token id whose outcome is read, per prompt.
        rivals: The token id that the logit difference is taken from, per prompt.
        masking: How tokens are masked.
        batch_size: Rows run at once.
        progress: Whether to count rows on standard error.
        runs: How many rows were run.
    """

    adapter: Adapter
    prompts: Sequence[Int[Tensor, " _"]]
    targets: Sequence[int]
    rivals: Sequence[int]
    masking: Masking
    batch_size: int = 64
    progress: bool = True
    runs: int = 0
    _known: dict[tuple[int, int], tuple[float, ...]] = field(default_factory=dict, repr=False)

    def need(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Run what was not run yet.

        Args:
            wanted: Pairs of a prompt's number and a set of masked positions, bit j for position j.
        """
        missing = [key for key in dict.fromkeys(wanted) if key not in self._known]
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for prompt, masked in missing:
            length = len(self.prompts[prompt])
            left = length - masked.bit_count() if self.masking.kind == "delete" else length
            groups.setdefault((length, left), []).append((prompt, masked))
        with tqdm(total=len(missing), desc=f"masked by {self.masking.kind}", delay=2, leave=False,
                  disable=not self.progress) as bar:  # fmt: skip
            for (length, _), keys in groups.items():
                for start in range(0, len(keys), self.batch_size):
                    batch = keys[start : start + self.batch_size]
                    self._run(batch, length)
                    bar.update(len(batch))

    def _run(self, batch: list[tuple[int, int]], length: int) -> None:
        ids = torch.stack([self.prompts[prompt] for prompt, _ in batch])
        bits = [[masked >> j & 1 for j in range(length)] for _, masked in batch]
        masked = torch.tensor(bits, dtype=torch.bool, device=ids.device)
        logits = end_logits(self.adapter, ids, masked, self.masking)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        both = [(self.targets[prompt], self.rivals[prompt]) for prompt, _ in batch]
        both = torch.tensor(both, device=ids.device)
        target, (logit, rival) = both[:, 0], logits.gather(1, both).unbind(1)
        others = logits.scatter(1, target[:, None], -torch.inf).logsumexp(-1)
        log_odds = logit - others
        agreement = (logits.argmax(-1) == target).to(logit)
        found = torch.stack([log_odds.sigmoid(), log_odds, logit, logit - rival, agreement], 1)
        self._known |= zip(batch, map(tuple, found.tolist()), strict=True)
        self.runs += len(batch)

    def forget(self) -> None:
        """Let go of all outcomes."""
        self._known.clear()

    def outcomes(self, prompt: int, metric: str, masked: Sequence[int]) -> list[float]:
        """The metric of one prompt under many sets of masked positions."""
        keys, column = [(prompt, one) for one in masked], METRICS.index(metric)
        self.need(keys)
        return [self._known[key][column] for key in keys]
