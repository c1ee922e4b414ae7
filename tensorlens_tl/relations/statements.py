"""One template of a relation, filled with every subject: fitted, decoded and edited.

1. :func:`state` fills the template with every subject and captures each prompt once.
2. :meth:`Statements.fit` averages the maps of training subjects to one linear relation.
3. :meth:`Statements.decoded` decodes other subjects by the relation, without running the model.
4. :meth:`Statements.causal` edits hidden states by the relation's inverse and runs the real model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import is_int, kind_of, spelled
from ..costs import rehearsed
from ..hosts import adapt
from ..lens import TensorLens
from ..plugin import capture
from ..recording import LiveModel
from .linear_relation import (
    MAP_METHODS,
    ROWS,
    LinearRelation,
    Maps,
    jacobian_maps,
    operator_maps,
    with_row,
)
from .relation import Relation, refuse, subject_position

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Ranks of the inverse to choose from."""


@spelled
@dataclass(frozen=True, eq=False, repr=False)
class Statements:
    """A template filled with every subject, each run once; made by :func:`state`.

    Attributes:
        model: The host model; run again for Jacobians and edits, and left as it was.
        relation: The relation whose subjects fill the template.
        template: Text with one ``{}``.
        lenses: The captured lens of every subject's prompt.
        pos: Position of each subject's last token [subject].
        layers: Indices of the blocks before which hidden states are read.
        hidden: Hidden state h of every subject [subject, layer, d_model].
        output: Output y of every subject [subject, d_model].
        first: The model's own next token after each prompt, a token id [subject].
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

    def __repr__(self) -> str:
        return (
            f"Statements({self.template!r}, {len(self.lenses)} subjects, right {self.accuracy:.0%})"
        )

    def __len__(self) -> int:
        return len(self.lenses)

    @property
    def accuracy(self) -> float:
        """Share of subjects whose object begins with the model's own next token."""
        decode = self.lenses[0].capture.tokenizer.decode
        objects = (o.strip() for _, o in self.relation.samples)
        said = (decode([int(token)]).strip() for token in self.first)
        right = [bool(s) and o.startswith(s) for o, s in zip(objects, said, strict=True)]
        return sum(right) / len(right)

    def logits(self, y: Float[Tensor, "*many d_model"]) -> Float[Tensor, "*many d_vocab"]:
        """Compute logits of final normalized residuals as the model would, soft cap included."""
        unembed = self.lenses[0].capture.unembed.weights
        logits = y @ unembed.W_U.detach().to(y.dtype)
        logits = logits if unembed.b_U is None else logits + unembed.b_U.detach()
        cap = unembed.soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def maps(self, method: str, subject: int) -> Maps:
        """Give W and b of one subject's prompt, computed once.

        Args:
            method: One of :data:`MAP_METHODS`.
            subject: Index of the subject.

        Returns:
            W and b before each of :attr:`layers`.

        Raises:
            ValueError: If there is no such method.
        """
        if method not in MAP_METHODS:
            raise ValueError(
                f"There is no method {method!r}. Choose one of {', '.join(MAP_METHODS)}."
            )
        known = _MAPS.setdefault(self, {})
        if (method, subject) not in known:
            at = self.lenses[subject], int(self.pos[subject]), self.layers
            with torch.no_grad():
                known[method, subject] = (
                    operator_maps(*at) if method == "operator" else jacobian_maps(*at, self.model)
                )
        return known[method, subject]

    def fit(
        self,
        method: str,
        train: Sequence[int],
        betas: Sequence[float] = (1.0,),
        layers: Sequence[int] | None = None,
    ) -> LinearRelation:
        """Average W and b over training subjects, and choose layer and β by leaving one out.

        Every training subject is decoded by the mean of the other training subjects' maps. The
        layer is chosen at which most are decoded as the model itself says; of equal layers, the
        earliest. Of the βs that do best there, the middle one is chosen. No other subject is looked
        at.

        Args:
            method: One of :data:`MAP_METHODS`.
            train: Indices of the training subjects.
            betas: Values of β to choose from, in order.
            layers: Indices of the blocks to choose from. None is all of :attr:`layers`.

        Returns:
            The fitted relation.

        Raises:
            ValueError: If there are fewer than two training subjects or no β, a subject or layer
                was not read, or there is no such method.
        """
        places, train = self._layer_places(layers), self._subjects(train)
        if len(set(train)) < 2 or len(set(train)) < len(train) or not betas:
            raise ValueError(
                f"train={train} and betas={list(betas)} are too few or repeat a subject. "
                "Pass at least two different training subjects and one β."
            )
        maps = [self.maps(method, i) for i in train]
        W, b = (torch.stack([getattr(m, part) for m in maps])[:, places] for part in ("W", "b"))
        h, n = self.hidden[list(train)][:, places], len(train)
        # Row n weighs every training subject but n: the mean of the others' maps.
        others = (1 - torch.eye(n, dtype=h.dtype, device=h.device)) / (n - 1)
        read = torch.einsum("nm,mlij,nlj->nli", others, W, h)
        rest = torch.einsum("nm,mli->nli", others, b)
        token = self.first[list(train), None]
        # A hit is the model's own token, whether or not it begins the object. [beta, layer]
        hits = torch.stack(
            [(self.logits(beta * read + rest).argmax(-1) == token).sum(0) for beta in betas]
        )
        best = int(hits.max(0).values.argmax())  # the first of the largest
        # Often many βs decode alike; the middle one is farthest from those that do not.
        tied = (hits[:, best] == hits[:, best].max()).nonzero().flatten()
        beta, layer = betas[int(tied[len(tied) // 2])], self.layers[places[best]]
        subjects = tuple(self.relation.subjects[i] for i in train)
        return LinearRelation(method, layer, beta, W[:, best].mean(0), b[:, best].mean(0), subjects)

    def _subjects(self, given: Any) -> list[int]:
        chosen: list[Any] = [given] if isinstance(given, int | str) else list(given)
        if wrong := [i for i in chosen if not is_int(i) or i not in range(len(self))]:
            raise ValueError(
                f"{wrong[0]!r} is not the index of a subject. "
                f"Pass indices from 0 to {len(self) - 1}."
            )
        return list(map(int, chosen))

    def _layer_places(self, layers: Sequence[int] | None) -> list[int]:
        layers = self.layers if layers is None else layers
        if not layers or not set(layers) <= set(self.layers):
            raise ValueError(
                f"layers={list(layers)} were not all read. Choose some of {list(self.layers)}."
            )
        return [self.layers.index(layer) for layer in layers]

    def decoded(self, relation: LinearRelation, test: Sequence[int]) -> Int[Tensor, " subject"]:
        """Decode subjects by a relation; the result is faithful where it equals :attr:`first`.

        Args:
            relation: A relation that :meth:`fit` gave.
            test: Indices of the subjects.

        Returns:
            The decoded token ids [subject].

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
            subjects: Indices of the subjects whose prompts run.
            layer: Index of the block before which h is replaced.
            h: Hidden states that replace the run's own [subject, d_model].

        Returns:
            The logits at the last position [subject, d_vocab].

        Raises:
            ValueError: If the model's weights were written to since.
        """
        for i in set(subjects):
            self.lenses[i]._check_unchanged()
        adapter, found = adapt(self.model), h.new_zeros(len(subjects), *self.output.shape[1:])
        point = adapter.points()[layer, "resid_pre"]
        # Prompts of one length run together, without padding.
        lengths = torch.tensor([self.lenses[i].embedding.shape[1] for i in subjects])
        for length in lengths.unique():
            for rows in (lengths == length).nonzero().flatten().split(ROWS):
                of = [self.lenses[subjects[row]].capture for row in rows.tolist()]
                ids = torch.cat([c.prompts.tokens for c in of])
                x = torch.cat([c.blocks[0].resid_pre for c in of]).to(adapter.dtype)
                final = torch.cat([c.unembed.final for c in of])
                # The captured states serve as input, so tokens need no embedding again.
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

        h′ = h + W†(y′ − y), with y′ the output of the other subject.

        Args:
            relation: A relation that :meth:`fit` gave.
            rank: Rank of the inverse W†.
            pairs: Indices of a subject and of the subject that it is edited into.

        Returns:
            The real model's logits at the last position [pair, d_vocab].
        """
        who, to = (list(side) for side in zip(*pairs, strict=True))
        h = self.hidden[who, self._layer_places([relation.layer])[0]]
        step = relation.step(self.output[to] - self.output[who], rank)
        return self.rerun(who, relation.layer, h + step)

    def substituted(
        self, layer: int, pairs: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "pair d_vocab"]:
        """Run subjects with the other subject's own h: the most that an edit at h can do."""
        who, to = (list(side) for side in zip(*pairs, strict=True))
        return self.rerun(who, layer, self.hidden[to, self._layer_places([layer])[0]])

    def fit_causal(
        self,
        method: str,
        train: Sequence[int],
        ranks: Sequence[int] = RANKS,
    ) -> tuple[LinearRelation, int]:
        """Find the layer and rank whose edits make the real model say most training objects.

        Every training subject is edited into every other training subject that has another object.
        Between equal shares, the mean log-probability of the other's token decides.

        Args:
            method: One of :data:`MAP_METHODS`.
            train: Indices of the training subjects.
            ranks: Ranks to choose from; ranks above d_model are ignored.

        Returns:
            The fitted relation and the rank.

        Raises:
            ValueError: If all training subjects have one object, or no rank fits.
        """
        pairs = [(i, j) for i in train for j in train if self.first[i] != self.first[j]]
        ranks = [rank for rank in ranks if 1 <= rank <= self.output.shape[-1]]
        if not pairs or not ranks:
            raise ValueError(
                f"There are {len(pairs)} pairs of training subjects with different objects, and "
                f"{len(ranks)} ranks from 1 to d_model. Pass subjects and ranks that give both."
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


_MAPS: WeakKeyDictionary[Statements, dict[tuple[str, int], Maps]] = WeakKeyDictionary()
"""Maps by method and subject, as fits ask for them again and again. Dropped with the statements."""


@spelled
def state(
    model: Any,
    relation: Relation,
    template: str | int = 0,
    layers: Sequence[int] | None = None,
    **kwargs: Any,
) -> Statements:
    """Fill a template with every subject and capture each prompt once.

    Args:
        model: The model, as for :func:`tensorlens_tl.capture`.
        relation: The relation whose subjects fill the template.
        template: Index of one of the relation's templates, or any text with one ``{}``.
        layers: Indices of the blocks before which hidden states are read. None is all blocks.
        **kwargs: Arguments of :func:`tensorlens_tl.capture`.

    Returns:
        The statements, ready to be fitted, decoded and edited.

    Raises:
        ValueError: If there is no such template or layer, or a subject ends within a token.

    Example:
        >>> from tensorlens_tl import demo
        >>> from tensorlens_tl.relations import Relation, state
        >>> pairs = (("France", "Paris"), ("Peru", "Lima"), ("Japan", "Tokyo"))
        >>> capitals = Relation("capital", ("The capital of {} is",), pairs)
        >>> statements = state(demo.load_model(), capitals, layers=[1, 2])
        >>> statements
        Statements('The capital of {} is', 3 subjects, right 100%)
        >>> statements.fit("operator", train=[0, 1])
        LinearRelation(operator, before block 1, β = 1, from France, Peru)
    """
    if not isinstance(relation, Relation):
        raise ValueError(
            f"relation is {kind_of(relation)}, not a Relation. "
            "Make one, or read one with Relation.load."
        )
    if isinstance(template, int) and not 0 <= template < len(relation.templates):
        raise ValueError(
            f"template={template} does not exist. "
            f"Pass an index from 0 to {len(relation.templates) - 1}, or a text with one {{}}."
        )
    template = relation.templates[template] if isinstance(template, int) else template
    refuse(template.count("{}") != 1, relation.name, "a template with one {}", repr(template))
    (adapter := adapt(model)).require_next_token("state")
    n_layers = len(adapter.weights.blocks)
    given = range(n_layers) if layers is None else layers
    layers = tuple(given) if isinstance(given, Iterable) else ()
    if not layers or not set(layers) <= set(range(n_layers)):
        raise ValueError(
            f"layers={given!r} is not a list of blocks. Pass indices from 0 to {n_layers - 1}."
        )
    own = {k: v for k, v in kwargs.items() if k in ("prepend_bos", "padding_side")}
    lenses, places = [], []
    for subject in relation.subjects:
        with torch.no_grad():
            lens = capture(model, template.replace("{}", subject), **kwargs)[1]
        lenses.append(lens)
        tokens = lens.capture.prompts.ids("decode")[0]
        places.append(subject_position(model, template, subject, tokens, **own))
    captured = [lens.capture for lens in lenses]
    hidden = [
        torch.stack([c.blocks[layer].resid_pre[0, pos] for layer in layers])
        for c, pos in zip(captured, places, strict=True)
    ]
    first = torch.stack([c.logits[0, -1].argmax() for c in captured])
    if rehearsed():  # where every answer would be the same
        first = torch.arange(len(first))
    return Statements(
        model=model,
        relation=relation,
        template=template,
        lenses=tuple(lenses),
        pos=torch.tensor(places),
        layers=layers,
        hidden=torch.stack(hidden),
        output=torch.stack([c.unembed.final[0, -1] for c in captured]),
        first=first,
    )
