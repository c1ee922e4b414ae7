"""Measure the demo model's circuits: attention, ablation and patching of single heads."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from . import unseen
from .grammar import Document
from .tokenizer import BOS, IDS, PAD

Head = tuple[int, int]
Sites = dict[tuple[str, int], torch.Tensor]


def name(head: Head) -> str:
    """Return a head's name, such as "L1H2"."""
    return f"L{head[0]}H{head[1]}"


def padded(rows: list[tuple[str, ...]]) -> torch.Tensor:
    """Encode rows of words, a BOS before each and padding behind.

    Args:
        rows: Words of every row.

    Returns:
        Token ids, [rows, position].
    """
    width = max(map(len, rows))
    return torch.tensor(
        [[IDS[word] for word in (BOS, *row)] + [IDS[PAD]] * (width - len(row)) for row in rows]
    )


@contextmanager
def editing(model: Any, edit: Callable[[str, int, torch.Tensor], torch.Tensor]):
    """Pass the model's activations through a function while it runs.

    Args:
        model: The demo model as a ``GPT2LMHeadModel``.
        edit: Function of a site, a layer and the value there, which gives the value to go on with.
            The sites are "resid" (a block's input, [rows, position, d_model]), "z" (the heads'
            outputs before W_O, [rows, position, head, d_head]) and "mlp" (the MLP's output).

    Yields:
        Nothing; hooks are on inside the context.
    """
    heads = model.config.n_head

    def on_z(layer: int):
        def hook(_module, inputs):
            z = inputs[0].unflatten(-1, (heads, -1))
            return (edit("z", layer, z).flatten(-2),)

        return hook

    def on_resid(layer: int):
        return lambda _module, inputs: (edit("resid", layer, inputs[0]), *inputs[1:])

    def on_mlp(layer: int):
        return lambda _module, _inputs, output: edit("mlp", layer, output)

    with ExitStack() as stack:
        for layer, block in enumerate(model.transformer.h):
            for handle in (
                block.register_forward_pre_hook(on_resid(layer)),
                block.attn.c_proj.register_forward_pre_hook(on_z(layer)),
                block.mlp.register_forward_hook(on_mlp(layer)),
            ):
                stack.callback(handle.remove)
        yield


def record(model: Any, ids: torch.Tensor) -> Sites:
    """Run the model and keep the values at every site.

    Args:
        model: The demo model.
        ids: Token ids, [rows, position].

    Returns:
        Values by site and layer, as in :func:`editing`.
    """
    sites: Sites = {}

    def keep(site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        sites[site, layer] = value
        return value

    with editing(model, keep):
        model(ids)
    return sites


def without(model: Any, heads: list[Head], real: torch.Tensor):
    """Ablate heads: each gives its mean over all real tokens instead of its output.

    Args:
        model: The demo model.
        heads: Layer and index of each head.
        real: True where a token is not padding, [rows, position].

    Returns:
        A context in which the heads are ablated.
    """

    def edit(site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        if site == "z":
            value = value.clone()
            for index in (head for at, head in heads if at == layer):
                value[:, :, index] = value[:, :, index][real].mean(0)
        return value

    return editing(model, edit)


def _heads(model: Any) -> Iterator[Head]:
    config = model.config
    return ((layer, head) for layer in range(config.n_layer) for head in range(config.n_head))


def repetition_accuracy(model: Any, ids: torch.Tensor) -> float:
    """Measure how often the most likely next token is right in a repeated segment.

    Args:
        model: The demo model.
        ids: A BOS and twice the same segment, [rows, 1 + 2 length].

    Returns:
        The share, over the second segment from its second word on.
    """
    length = ids.shape[1] // 2
    guess = model(ids).logits.argmax(-1)
    return (guess[:, length + 1 : -1] == ids[:, length + 2 :]).float().mean().item()


def induction_circuit(model: Any, n: int, seed: int, length: int = 25) -> dict:
    """Find previous-token and induction heads by attention, and test them by ablation.

    Args:
        model: The model, with eager attention.
        n: Number of repeated segments.
        seed: Seed of the segments.
        length: Length of a segment, in words.

    Returns:
        Figures by name: the scores of all heads, the heads over one half, what is left of the
        accuracy without each of them, without all of a kind, and without as many others.
    """
    ids = padded([drawn.words for drawn in unseen("induction", n, seed, length)])
    real = torch.ones_like(ids, dtype=torch.bool)
    patterns = model(ids, output_attentions=True).attentions
    second = torch.arange(length + 1, 2 * length)
    scores = {"previous_token": {}, "induction": {}, "duplicate_token": {}}
    for layer, head in _heads(model):
        pattern = patterns[layer][:, head]
        for kind, back in (("previous_token", 1), ("induction", length - 1)):
            scores[kind][layer, head] = pattern[:, second, second - back].mean().item()
        scores["duplicate_token"][layer, head] = pattern[:, second, second - length].mean().item()
    whole = repetition_accuracy(model, ids)
    figures: dict = {"accuracy": whole}
    for kind, by_head in scores.items():
        found = [head for head in by_head if by_head[head] > 0.4]
        effects = {}
        for head in found:
            with without(model, [head], real):
                effects[name(head)] = repetition_accuracy(model, ids)
        with without(model, found, real):
            together = repetition_accuracy(model, ids)
        figures[kind] = {
            "scores": {name(head): value for head, value in by_head.items()},
            "heads": [name(head) for head in found],
            "accuracy_without_each": effects,
            "accuracy_without_all": together,
        }
    key_heads = {h for k in ("previous_token", "induction") for h in figures[k]["heads"]}
    others = [head for head in _heads(model) if name(head) not in key_heads]
    effects = []
    for head in others:
        with without(model, [head], real):
            effects.append(repetition_accuracy(model, ids))
    figures["lowest_accuracy_without_another_head"] = min(effects)
    return figures


class IndirectObject:
    """Held-out indirect-object prompts, their positions and the logit difference.

    Args:
        model: The model, with eager attention.
        drawn: Documents of the task.
    """

    def __init__(self, model: Any, drawn: list[Document]) -> None:
        clean = [d.words[: len(d.corrupted)] for d in drawn]
        self.model = model
        self.ids, self.corrupted_ids = padded(clean), padded([d.corrupted for d in drawn])
        self.real = self.ids != IDS[PAD]
        self.rows = torch.arange(len(drawn))
        self.end = torch.tensor([len(words) for words in clean])
        answers = [d.words[len(d.corrupted)] for d in drawn]
        self.indirect = torch.tensor([1 + c.index(a) for c, a in zip(clean, answers, strict=True)])
        self.first = torch.tensor([1 + c.index(d.foil) for c, d in zip(clean, drawn, strict=True)])
        self.second = (self.ids != self.corrupted_ids).int().argmax(-1)
        self.answer = torch.tensor([IDS[a] for a in answers])
        self.foil = torch.tensor([IDS[d.foil] for d in drawn])

    def difference(self, ids: torch.Tensor | None = None) -> float:
        """Measure the mean logit difference of the indirect object and the subject.

        Args:
            ids: Token ids, [rows, position]; by default the clean prompts.

        Returns:
            The mean over the prompts.
        """
        logits = self.model(self.ids if ids is None else ids).logits[self.rows, self.end]
        return (logits[self.rows, self.answer] - logits[self.rows, self.foil]).mean().item()

    def accuracy(self) -> float:
        """Measure how often the indirect object is the most likely token of all.

        Returns:
            The share of the clean prompts.
        """
        guess = self.model(self.ids).logits[self.rows, self.end].argmax(-1)
        return (guess == self.answer).float().mean().item()

    def attention(self) -> dict[Head, dict[str, float]]:
        """Measure each head's attention from the end of the prompt and from the repeated name.

        Returns:
            By head: from the end to the indirect object, to the subject's first and second
            mention; and from the second mention to the first and to the token after it.
        """
        patterns = self.model(self.ids, output_attentions=True).attentions
        places = {
            "end_to_indirect_object": (self.end, self.indirect),
            "end_to_subject": (self.end, self.first),
            "end_to_repeated_name": (self.end, self.second),
            "repeated_name_to_first": (self.second, self.first),
            "repeated_name_to_after_first": (self.second, self.first + 1),
        }
        return {
            (layer, head): {
                place: patterns[layer][self.rows, head, query, key].mean().item()
                for place, (query, key) in places.items()
            }
            for layer, head in _heads(self.model)
        }

    def direct(self) -> dict[Head, float]:
        """Measure each head's direct effect at the end, the last layer norm's scale held.

        Returns:
            By head: what it adds to the mean logit difference.
        """
        sites = record(self.model, self.ids)
        blocks, last = self.model.transformer.h, self.model.transformer.ln_f
        final: list[torch.Tensor] = []
        with last.register_forward_pre_hook(lambda _module, inputs: final.append(inputs[0])):
            self.model(self.ids)
        scale = final[0][self.rows, self.end].var(-1, unbiased=False).add(last.eps).sqrt()
        unembed = self.model.lm_head.weight
        toward = (unembed[self.answer] - unembed[self.foil]) * last.weight
        # The last LayerNorm subtracts the mean, so only what is left of the direction acts.
        toward = (toward - toward.mean(-1, keepdim=True)) / scale[:, None]
        found = {}
        for layer, head in _heads(self.model):
            z = sites["z", layer][self.rows, self.end, head]
            d_head = z.shape[-1]
            # Rows of W_O that belong to this head.
            out = z @ blocks[layer].attn.c_proj.weight[head * d_head : (head + 1) * d_head]
            found[layer, head] = (out * toward).sum(-1).mean().item()
        return found

    def patched(self, where: Callable[[str, int, torch.Tensor, torch.Tensor], torch.Tensor]):
        """Run the clean prompts with activations of the corrupted ones.

        Args:
            where: Function of a site, a layer, the clean and the corrupted value there, which
                gives the value to go on with.

        Returns:
            The share of the difference between the clean and the corrupted run that the patch
            makes: 0 is none, 1 all of it.
        """
        if not hasattr(self, "_reference"):
            self._reference = (
                self.difference(),
                self.difference(self.corrupted_ids),
                record(self.model, self.corrupted_ids),
            )
        clean, corrupted, sites = self._reference
        with editing(self.model, lambda s, layer, v: where(s, layer, v, sites[s, layer])):
            return (clean - self.difference()) / (clean - corrupted)


def indirect_object_circuit(model: Any, n: int, seed: int) -> dict:
    """Measure how the model finds the indirect object.

    Args:
        model: The model, with eager attention.
        n: Number of prompts.
        seed: Seed of the prompts.

    Returns:
        Figures by name: attention and direct effects by head, patching by head, MLP and position,
        and the heads found, with the logit difference left when they are ablated.
    """
    task = IndirectObject(model, unseen("ioi", n, seed))
    attention, direct = task.attention(), task.direct()

    def head_patch(at: Head):
        def where(site, layer, clean, corrupted):
            if (site, layer) != ("z", at[0]):
                return clean
            value = clean.clone()
            value[:, :, at[1]] = corrupted[:, :, at[1]]
            return value

        return task.patched(where)

    def resid_patch(at: int, position: torch.Tensor):
        def where(site, layer, clean, corrupted):
            if (site, layer) != ("resid", at):
                return clean
            value = clean.clone()
            value[task.rows, position] = corrupted[task.rows, position]
            return value

        return task.patched(where)

    def mlp_patch(at: int):
        return task.patched(lambda s, layer, c, x: x if (s, layer) == ("mlp", at) else c)

    layers = range(model.config.n_layer)
    patched = {head: head_patch(head) for head in attention}
    kinds = {
        "name_movers": [
            head
            for head, to in attention.items()
            if to["end_to_indirect_object"] - to["end_to_subject"] > 0.2 and direct[head] > 0
        ],
        "both_names": [
            head
            for head, to in attention.items()
            if min(to["end_to_indirect_object"], to["end_to_subject"]) > 0.3
        ],
        "repeated_name": [
            head
            for head, to in attention.items()
            if to["end_to_repeated_name"] > 0.2 and patched[head] > 0.1
        ],
    }
    left, left_kind, accuracy = {}, {}, {}
    for head in attention:
        with without(model, [head], task.real):
            left[head] = task.difference()
    for kind, heads in kinds.items():
        with without(model, heads, task.real):
            left_kind[kind], accuracy[kind] = task.difference(), task.accuracy()
    named = {
        "attention": attention,
        "direct_effect": direct,
        "patch_head": patched,
        "difference_without": left,
    }
    return {
        "difference": task.difference(),
        "difference_corrupted": task.difference(task.corrupted_ids),
        **{key: {name(head): v for head, v in by.items()} for key, by in named.items()},
        "patch_mlp": {f"L{layer}MLP": mlp_patch(layer) for layer in layers},
        "patch_repeated_name": {f"L{k}": resid_patch(k, task.second) for k in layers},
        "patch_end": {f"L{k}": resid_patch(k, task.end) for k in layers},
        "heads": {kind: [name(head) for head in heads] for kind, heads in kinds.items()},
        "difference_without_all": left_kind,
        "accuracy": task.accuracy(),
        "accuracy_without_all": accuracy,
    }
