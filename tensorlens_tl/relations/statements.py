"""One template of a relation filled with every subject, each run once: fitted, decoded, edited."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..hosts import LiveModel, adapt
from ..lens import TensorLens
from ..plugin import capture
from .linear_relation import (
    METHODS,
    ROWS,
    LinearRelation,
    Maps,
    jacobian_maps,
    operator_maps,
    with_row,
)
from .relation import Relation, refuse, subject_position

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, eq=False, repr=False)
class Statements:
    """A template filled with every subject, each run once; :func:`state` makes it.

    Attributes:
        model: The host; run again for Jacobians and edits, and left as it was.
        relation: The relation.
        template: The template.
        lenses: A lens per subject.
        pos: Where each subject's last token stands [subject].
        layers: Blocks before which hidden states are read.
        hidden: h of every subject [subject, layer, d_model].
        output: y of every subject.
        first: The model's own first token after each prompt.
    """

    model: Any
    relation: Relation
    template: str
    lenses: tuple[TensorLens, ...]
    pos: Int[Tensor, " subject"]
    layers: tuple[int, ...]
    hidden: Float[Tensor, "subject layer d_model"]
    output: Float[Tensor, "subject d_model"]
    first: Int[Tensor, " subject"]
    _maps: dict[tuple[str, int], Maps] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Statements({self.template!r}, {len(self.lenses)} subjects, right {self.accuracy:.0%})"
        )

    def __len__(self) -> int:
        return len(self.lenses)

    @property
    def accuracy(self) -> float:
        """How often the model's own first token begins the object."""
        decode = self.lenses[0].capture.tokenizer.decode
        objects = (o.strip() for _, o in self.relation.samples)
        said = (decode([int(token)]).strip() for token in self.first)
        right = [bool(s) and o.startswith(s) for o, s in zip(objects, said, strict=True)]
        return sum(right) / len(right)

    def logits(self, y: Float[Tensor, "*many d_model"]) -> Float[Tensor, "*many d_vocab"]:
        """Logits of final normalized residuals, as the real model would read them (soft cap live)."""
        unembed = self.lenses[0].capture.unembed.weights
        logits = y @ unembed.W_U.detach().to(y.dtype)
        logits = logits if unembed.b_U is None else logits + unembed.b_U.detach()
        cap = unembed.soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def maps(self, method: str, subject: int) -> Maps:
        """W and b of one subject's prompt, computed once.

        Args:
            method: One of :data:`METHODS`.
            subject: Its index.

        Returns:
            The maps.

        Raises:
            ValueError: If there is no such method.
        """
        if method not in METHODS:
            raise ValueError(f"expected a method of {', '.join(METHODS)}, got {method!r}")
        key = method, subject
        if key not in self._maps:
            at = self.lenses[subject], int(self.pos[subject]), self.layers
            with torch.no_grad():
                found = (
                    operator_maps(*at) if method == "operator" else jacobian_maps(*at, self.model)
                )
            self._maps[key] = found
        return self._maps[key]

    def fit(
        self,
        method: str,
        train: Sequence[int],
        betas: Sequence[float] = (1.0,),
        layers: Sequence[int] | None = None,
    ) -> LinearRelation:
        """Average W and b over training subjects; layer and β by leaving each of them out in turn.

        Every training subject is decoded by the mean of the others' maps. The layer under which most are
        decoded as the model itself says is taken, the earliest of equals, and of the βs that do best
        there the middle one. No other subject is looked at.

        Args:
            method: One of :data:`METHODS`.
            train: Indices of the training subjects.
            betas: β to choose from, in order.
            layers: Layers to choose from; by default all that were read.

        Returns:
            The relation.

        Raises:
            ValueError: If there are fewer than two training subjects or no β, a subject or layer
                was not read, or there is no such method.
        """
        places, train = self._layer_places(layers), self._subjects(train)
        if len(set(train)) < 2 or len(set(train)) < len(train) or not betas:
            raise ValueError(
                f"expected at least two different training subjects and one β, got {list(train)} and "
                f"{list(betas)}"
            )
        maps = [self.maps(method, i) for i in train]
        W, b = (torch.stack([getattr(m, part) for m in maps])[:, places] for part in ("W", "b"))
        h, n = self.hidden[list(train)][:, places], len(train)
        others = (1 - torch.eye(n, dtype=h.dtype, device=h.device)) / (n - 1)
        read = torch.einsum("nm,mlij,nlj->nli", others, W, h)
        rest = torch.einsum("nm,mli->nli", others, b)
        token = self.first[list(train), None]
        hits = torch.stack(
            [(self.logits(beta * read + rest).argmax(-1) == token).sum(0) for beta in betas]
        )
        best = int(hits.max(0).values.argmax())  # the first of the largest
        tied = (hits[:, best] == hits[:, best].max()).nonzero().flatten()
        beta, layer = betas[int(tied[len(tied) // 2])], self.layers[places[best]]
        subjects = tuple(self.relation.subjects[i] for i in train)
        return LinearRelation(method, layer, beta, W[:, best].mean(0), b[:, best].mean(0), subjects)

    def _subjects(self, given: Any) -> list[int]:
        chosen: list[Any] = [given] if isinstance(given, int | str) else list(given)
        if wrong := [i for i in chosen if not isinstance(i, Integral) or i not in range(len(self))]:
            raise ValueError(
                f"expected indices of subjects, from 0 to {len(self) - 1}, got {wrong[0]!r}"
            )
        return list(map(int, chosen))

    def _layer_places(self, layers: Sequence[int] | None) -> list[int]:
        layers = self.layers if layers is None else layers
        if not layers or not set(layers) <= set(self.layers):
            raise ValueError(f"expected some of the layers {list(self.layers)}, got {list(layers)}")
        return [self.layers.index(layer) for layer in layers]

    def decoded(self, relation: LinearRelation, test: Sequence[int]) -> Int[Tensor, " subject"]:
        """The tokens that subjects are decoded to; faithful where they are :attr:`first`.

        Args:
            relation: From :meth:`fit`.
            test: Indices of the subjects.

        Returns:
            Token ids.

        Raises:
            ValueError: If there is no such subject.
        """
        h = self.hidden[self._subjects(test), self._layer_places([relation.layer])[0]]
        return self.logits(relation(h)).argmax(-1)

    def rerun(
        self, subjects: Sequence[int], layer: int, h: Float[Tensor, "subject d_model"]
    ) -> Float[Tensor, "subject d_vocab"]:
        """Run the real model with other hidden states at the subjects' last tokens.

        Args:
            subjects: Whose prompts.
            layer: The block before which h is replaced.
            h: What stands there instead.

        Returns:
            The logits at the last position.

        Raises:
            ValueError: If the model's weights were written to since.
        """
        for i in set(subjects):
            self.lenses[i]._check_unchanged()
        adapter, found = adapt(self.model), h.new_zeros(len(subjects), *self.output.shape[1:])
        point = adapter.points()[layer, "resid_pre"]
        lengths = torch.tensor([self.lenses[i].embedding.shape[1] for i in subjects])
        for length in lengths.unique():
            for rows in (lengths == length).nonzero().flatten().split(ROWS):
                of = [self.lenses[subjects[row]].capture for row in rows.tolist()]
                ids = torch.cat([c.prompts.tokens for c in of])
                x = torch.cat([c.blocks[0].resid_pre for c in of]).to(adapter.dtype)
                final = torch.cat([c.unembed.final for c in of])
                live = LiveModel(adapter, ids, x, final, (rows, ids))
                pos = self.pos[[subjects[row] for row in rows.tolist()]]
                edit = lambda t, pos=pos, rows=rows: with_row(t, pos, h[rows])  # noqa: E731
                with torch.no_grad():
                    found[rows] = live.run(x, [(point, edit)])[:, -1].to(found)
        return self.logits(found)

    def causal(
        self, relation: LinearRelation, rank: int, pairs: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "pair d_vocab"]:
        """Edit subjects into others by the relation's inverse, and run the real model.

        h′ = h + W†(y′ − y), with y′ the output of the subject it is to become.

        Args:
            relation: From :meth:`fit`.
            rank: Of the inverse.
            pairs: A subject, and the one it is to become.

        Returns:
            The real model's logits at the last position.
        """
        who, to = (list(side) for side in zip(*pairs, strict=True))
        h = self.hidden[who, self._layer_places([relation.layer])[0]]
        step = relation.step(self.output[to] - self.output[who], rank)
        return self.rerun(who, relation.layer, h + step)

    def substituted(
        self, layer: int, pairs: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "pair d_vocab"]:
        """The same with the other subject's own hidden state: as far as an edit at h can go."""
        who, to = (list(side) for side in zip(*pairs, strict=True))
        return self.rerun(who, layer, self.hidden[to, self._layer_places([layer])[0]])

    def fit_causal(
        self,
        method: str,
        train: Sequence[int],
        ranks: Sequence[int] = RANKS,
    ) -> tuple[LinearRelation, int]:
        """The layer and rank whose edits make the real model say the most training objects.

        Every training subject is edited into every other one with another object. The mean
        log-probability of its token decides between equals.

        Args:
            method: One of :data:`METHODS`.
            train: Indices of the training subjects.
            ranks: Ranks to choose from; those above d_model are passed over.

        Returns:
            The relation and the rank.

        Raises:
            ValueError: If all training subjects have one object, or no rank fits.
        """
        pairs = [(i, j) for i in train for j in train if self.first[i] != self.first[j]]
        ranks = [rank for rank in ranks if 1 <= rank <= self.output.shape[-1]]
        if not pairs or not ranks:
            raise ValueError(
                f"expected training subjects with two objects at least and ranks from 1 to d_model, got "
                f"{len(pairs)} pairs and ranks {list(ranks)}: draw others"
            )
        token = self.first[[j for _, j in pairs]]
        best: tuple[Any, ...] = ()
        for layer in self.layers:
            relation = self.fit(method, train, layers=[layer])
            for rank in ranks:
                logs = self.causal(relation, rank, pairs).log_softmax(-1)
                said = float(logs[torch.arange(len(pairs)), token].mean())
                score = float((logs.argmax(-1) == token).double().mean()), said
                best = max(best, (score, relation, rank), key=lambda row: row[:1])
        return best[1], best[2]


def state(
    model: Any,
    relation: Relation,
    template: str | int = 0,
    layers: Sequence[int] | None = None,
    **kwargs: Any,
) -> Statements:
    """Fill a template with every subject and run each prompt once.

    Args:
        model: As for :func:`tensorlens_tl.capture`.
        relation: The relation.
        template: One of its own, by index, or any text with one ``{}``.
        layers: Blocks before which hidden states are read; by default all.
        **kwargs: For the capture.

    Returns:
        The statements.

    Raises:
        ValueError: If there is no such template or layer, or a subject ends within a token.
    """
    if not isinstance(relation, Relation):
        raise ValueError(
            f"expected a Relation, got {type(relation).__name__}: Relation.load reads one from a file"
        )
    if isinstance(template, int) and not 0 <= template < len(relation.templates):
        raise ValueError(
            f"expected a template from 0 to {len(relation.templates) - 1}, got {template}"
        )
    template = relation.templates[template] if isinstance(template, int) else template
    refuse(template.count("{}") != 1, relation.name, "a template with one {}", repr(template))
    n_layers = len(adapt(model).weights.blocks)
    given = range(n_layers) if layers is None else layers
    layers = tuple(given) if isinstance(given, Iterable) else ()
    if not layers or not set(layers) <= set(range(n_layers)):
        raise ValueError(f"expected a list of layers from 0 to {n_layers - 1}, got {given!r}")
    own = {k: v for k, v in kwargs.items() if k in ("prepend_bos", "padding_side")}
    lenses, places = [], []
    for subject in relation.subjects:
        with torch.no_grad():
            lens = capture(model, template.replace("{}", subject), **kwargs)[1]
        lenses.append(lens)
        tokens = lens.capture.prompts.tokens[0]
        places.append(subject_position(model, template, subject, tokens, **own))
    captured = [lens.capture for lens in lenses]
    hidden = [
        torch.stack([c.blocks[layer].resid_pre[0, pos] for layer in layers])
        for c, pos in zip(captured, places, strict=True)
    ]
    return Statements(
        model, relation, template, tuple(lenses), torch.tensor(places), layers, torch.stack(hidden),
        torch.stack([c.unembed.final[0, -1] for c in captured]),
        torch.stack([c.logits[0, -1].argmax() for c in captured]),
    )  # fmt: skip
