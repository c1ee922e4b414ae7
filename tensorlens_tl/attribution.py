"""Where a logit comes from: the operator's answer to one target, split by source.

One transposed sweep carries the target's covector u to every residual site. A token's contribution
is then ⟨Tᵀu, x⟩ at its position, a constant's ⟨covector where it is added, constant⟩ (the sweep
collects it on its way), and both together are the target, exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from operator import index as operator_index
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .capturing import Capture, Convention
from .composer import Branch, FrozenTransformer
from .graph import Node
from .primitives import soft_cap_ratio, take_row

if TYPE_CHECKING:
    import pandas

BY = ("token", "component")

FORMAT = "tensorlens_tl attribution 1"

TargetLike = str | SupportsIndex | Sequence[float] | Tensor | None
"""A token string, a token id, a direction [d_vocab] or [d_model], or None: the own prediction."""


# --- Targets -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Target:
    """A linear functional of the final normalized residual at one position per prompt.

    Attributes:
        name: For people, one per prompt.
        query: Position [batch], as tensor index.
        covector: u [batch, d_model], so that target = u · y + constant.
        constant: What b_U contributes [batch].
        value: The run's own value [batch]: from the model's logits, not from the operator.
    """

    name: tuple[str, ...]
    query: Int[Tensor, " batch"]
    covector: Float[Tensor, "batch d_model"]
    constant: Float[Tensor, " batch"]
    value: Float[Tensor, " batch"]

    def minus(self, other: Target) -> Target:
        """This target's advantage over another at the same position."""
        names = (f"{a} − {b}" for a, b in zip(self.name, other.name, strict=True))
        return Target(
            tuple(names),
            self.query,
            self.covector - other.covector,
            self.constant - other.constant,
            self.value - other.value,
        )


def token_id(capture: Capture, text: str) -> int:
    """The id of a one-token string: as given, else without its leading space.

    Returns:
        The id.

    Raises:
        ValueError: If there is no tokenizer, the string is not one token (the message shows its
            pieces), or the tokenizer does not know it.
    """
    tokenizer = capture.tokenizer
    if tokenizer is None:
        raise ValueError(f"no tokenizer to read the target {text!r} with: pass a token id")
    unknown = getattr(tokenizer, "unk_token_id", None)
    pieces: list[int] = []
    for attempt in dict.fromkeys((text, text.removeprefix(" "))):
        ids = tokenizer.encode(attempt, add_special_tokens=False)
        if len(ids) == 1 and ids[0] != unknown:
            return ids[0]
        pieces = pieces or ids
    if len(pieces) == 1 or all(piece == unknown for piece in pieces):
        raise ValueError(f"the tokenizer does not know the target {text!r}: expected a known token")
    shown = ", ".join(f"{tokenizer.decode([piece])!r} #{piece}" for piece in pieces)
    raise ValueError(
        f"the target {text!r} is {len(pieces)} tokens ({shown}), expected one: take one of them, or "
        "pass a token id"
    )


def resolve_target(capture: Capture, target: TargetLike, pos: int = -1) -> Target:
    """Turn what a user names into a functional of the final normalized residual.

    Args:
        capture: The run.
        target: A token string, a token id, a direction in logits [d_vocab] or in the final
            normalized residual [d_model], or None for the model's own prediction.
        pos: Position among the real tokens; −1 is the last.

    Returns:
        The functional, for every prompt.

    Raises:
        ValueError: If the target or the position does not exist.
    """
    frame, unembed = capture.frame, capture.unembed.weights
    query, prompts = frame.index(pos), torch.arange(frame.batch, device=frame.device)
    d_vocab = unembed.W_U.shape[1]
    y, logits = capture.unembed.final[prompts, query], frame.cast(capture.logits[prompts, query])
    if not isinstance(target, str | int | None) and getattr(target, "ndim", None) != 0:
        return _direction(capture, target, query, y, logits)
    if target is None:
        ids = logits.argmax(-1)
    else:
        index = token_id(capture, target) if isinstance(target, str) else _as_id(target)
        if not 0 <= index < d_vocab:
            raise ValueError(
                f"target id {index} is outside the vocabulary: expected 0 to {d_vocab - 1}"
            )
        ids = torch.full_like(query, index)
    covector = frame.cast(unembed.W_U[:, ids].T)
    constant = torch.zeros_like(y[:, 0]) if unembed.b_U is None else frame.cast(unembed.b_U[ids])
    if unembed.soft_cap is not None:
        ratio = soft_cap_ratio((covector * y).sum(-1) + constant, unembed.soft_cap)
        covector, constant = covector * ratio[:, None], constant * ratio
    names = tuple(repr(_decode(capture, int(i))) for i in ids)
    return Target(names, query, covector, constant, logits[prompts, ids])


def _as_id(target: Any) -> int:
    try:
        if isinstance(target, bool):
            raise TypeError
        return operator_index(target)
    except TypeError:
        raise _no_target(target) from None


def _no_target(target: Any) -> ValueError:
    return ValueError(
        f"expected a target token, id or direction, got {target!r} of {type(target).__name__}: pass "
        "a string, an integer or a one-dimensional tensor"
    )


def _direction(
    capture: Capture, direction: Any, query: Tensor, y: Tensor, logits: Tensor
) -> Target:
    frame, unembed = capture.frame, capture.unembed
    d_model, d_vocab = unembed.weights.W_U.shape
    try:
        u = torch.as_tensor(direction)
    except (TypeError, ValueError, RuntimeError):
        raise _no_target(direction) from None
    if u.ndim != 1 or u.shape[0] not in (d_model, d_vocab) or d_model == d_vocab:
        raise ValueError(
            f"expected a direction in logits [{d_vocab}] or in the final residual [{d_model}], got "
            f"shape {list(u.shape)}" + (" (the two widths are equal)" if d_model == d_vocab else "")
        )
    u = u.detach().to(y)
    if u.shape[0] == d_model:
        covector, zeros = u.expand(frame.batch, -1), torch.zeros_like(y[:, 0])
        return Target(("residual direction",) * frame.batch, query, covector, zeros, y @ u)
    ratio = unembed.ratio
    weighted = u * (take_row(ratio, query)[:, 0] if isinstance(ratio, Tensor) else ratio)
    weighted = weighted.expand(frame.batch, -1)
    b_U = unembed.weights.b_U
    constant = torch.zeros_like(y[:, 0]) if b_U is None else weighted @ frame.cast(b_U)
    covector = weighted @ frame.cast(unembed.weights.W_U).T
    return Target(("logit direction",) * frame.batch, query, covector, constant, logits @ u)


def _decode(capture: Capture, token: int) -> str:
    return str(token) if capture.tokenizer is None else capture.tokenizer.decode([token])


# --- Results -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """One row of an attribution: a node, at a position where it has one (a tensor index)."""

    node: Node
    pos: int | None = None


@dataclass(frozen=True, eq=False)
class Attribution:
    """A target split by source, one row per source, for every prompt of the batch.

    Attributes:
        values: Contributions [prompt, source], in units of the target (logits).
        sources: What the columns are; positions outside a prompt's real tokens contribute 0.
        labels: Their names, per prompt.
        by: What it was split by.
        target: The target's name, per prompt.
        target_value: Its value in the model's own run [prompt].
        sums_to_target: Whether the contributions add up to the target.
        completeness_error: max over prompts of |Σ − target| / Σ|contributions|, where they do.
        convention: The choices under which the operator is unique.
        spans: Each prompt's (start, stop) of real tokens.
    """

    values: Float[Tensor, "prompt source"]
    sources: tuple[Source, ...]
    labels: tuple[tuple[str, ...], ...]
    by: str
    target: tuple[str, ...]
    target_value: Float[Tensor, " prompt"]
    sums_to_target: bool
    convention: Convention
    spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, prompt: int) -> Attribution:
        """One prompt's attribution, without its padding."""
        if not -len(self) <= prompt < len(self):
            raise IndexError(f"prompt {prompt} does not exist; there are {len(self)}")
        prompt %= len(self)
        start, stop = self.spans[prompt]
        keep = [i for i, s in enumerate(self.sources) if s.pos is None or start <= s.pos < stop]
        one = slice(prompt, prompt + 1)
        return replace(
            self,
            values=self.values[one, keep],
            sources=tuple(self.sources[i] for i in keep),
            labels=(tuple(self.labels[prompt][i] for i in keep),),
            target=self.target[one],
            target_value=self.target_value[one],
            spans=self.spans[one],
        )

    @property
    def completeness_error(self) -> float | None:
        """Max over prompts of |Σ − target| / Σ|contributions|; None where they do not sum to it."""
        if not self.sums_to_target:
            return None
        off = (self.values.double().sum(1) - self.target_value).abs()
        size = self.values.double().abs().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
        return float((off / size).max())

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The k largest contributions by absolute value, as (label, value).

        Returns:
            At most k pairs, largest first.

        Raises:
            ValueError: If k < 1 or there are several prompts.
        """
        if len(self) != 1:
            raise ValueError(
                f"top expects one prompt, got {len(self)}: take one with attribution[i]"
            )
        if k < 1:
            raise ValueError(f"expected k ≥ 1, got {k}")
        order = self.values[0].abs().argsort(descending=True)[:k].tolist()
        return [(self.labels[0][i], float(self.values[0, i])) for i in order]

    def to_dataframe(self) -> pandas.DataFrame:
        """The rows as a table: prompt, label, node, pos (among the real tokens), value.

        Returns:
            One row per prompt and source.

        Raises:
            ValueError: If pandas is missing.
        """
        try:
            import pandas
        except ImportError:
            raise ValueError(
                "to_dataframe needs pandas: pip install 'tensorlens-tl[pandas]'"
            ) from None
        rows = []
        for prompt, (start, stop) in enumerate(self.spans):
            for i, source in enumerate(self.sources):
                if source.pos is None or start <= source.pos < stop:
                    pos = None if source.pos is None else source.pos - start
                    value = float(self.values[prompt, i])
                    label = self.labels[prompt][i]
                    rows.append((prompt, label, str(source.node), pos, value))
        return pandas.DataFrame(rows, columns=["prompt", "label", "node", "pos", "value"])

    def to_json(self) -> str:
        """The attribution as JSON; :meth:`from_json` gives the same numbers back, to the bit."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data |= {"format": FORMAT, "dtype": str(self.values.dtype).removeprefix("torch.")}
        data["values"] = [[_number(x) for x in row] for row in self.values.tolist()]
        data["target_value"] = [_number(x) for x in self.target_value.tolist()]
        data["sources"] = [(astuple(source.node), source.pos) for source in self.sources]
        return json.dumps(data | {"convention": asdict(self.convention)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Attribution:
        """Read what :meth:`to_json` wrote.

        Args:
            text: JSON.

        Returns:
            The attribution, on the CPU.

        Raises:
            ValueError: If the text is not a whole attribution.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            dtype = {"float32": torch.float32, "float64": torch.float64}[data.pop("dtype")]
            for name in ("values", "target_value"):
                data[name] = _tensor(data[name], dtype)
            data["sources"] = tuple(Source(Node(*node), pos) for node, pos in data["sources"])
            for name in ("labels", "spans"):
                data[name] = tuple(map(tuple, data[name]))
            data |= {
                "target": tuple(data["target"]),
                "convention": Convention(**data["convention"]),
            }
            found = cls(**data)
            shape = len(found.target), len(found.sources)
            widths = {len(found.sources), *map(len, found.labels)}
            heights = {
                len(found.target),
                len(found.labels),
                len(found.spans),
                len(found.target_value),
            }
            if found.values.shape != shape or len(widths) != 1 or len(heights) != 1:
                raise ValueError(f"values, sources, labels and target do not fit {list(shape)}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"expected an attribution that to_json wrote, got something else ({error}): write "
                "it again"
            ) from None
        return found

    def __repr__(self) -> str:
        head = f"Attribution by {self.by} of {', '.join(self.target[:3])}"
        if len(self) > 1:
            return f"{head}{', …' if len(self) > 3 else ''}: {len(self)} prompts × {len(self.sources)} rows"
        error = self.completeness_error
        total = f" = {float(self.target_value[0]):.4g}"
        exact = "" if error is None else f" (sum off by {error:.0e} of Σ|·|)"
        rows = "\n".join(f"  {value:+9.4f}  {label}" for label, value in self.top(10))
        more = len(self.sources) - 10
        return f"{head}{total}{exact}\n{rows}" + (f"\n  … {more} more" if more > 0 else "")


def _number(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)  # JSON has no nan


def _tensor(rows: Any, dtype: torch.dtype) -> Tensor:
    nested = bool(rows) and isinstance(rows[0], list)
    numbers = [[float(x) for x in row] for row in rows] if nested else [float(x) for x in rows]
    return torch.tensor(numbers, dtype=torch.float64).to(dtype)


# --- The two splits ------------------------------------------------------------------------------


def attribute(
    capture: Capture, operator: FrozenTransformer, target: Target, by: str = "token"
) -> Attribution:
    """Split a target by source.

    Args:
        capture: The run.
        operator: Its operator.
        target: From :func:`resolve_target`.
        by: "token": token embedding, position embedding and every constant apart (DESIGN law:
            Σ = target). "component": the direct effect of every writer to the residual stream,
            each head and MLP with its internal constants, external constants apart (Σ = target).

    Returns:
        The contributions, for every prompt.

    Raises:
        ValueError: If ``by`` is none of these.
    """
    if by not in BY:
        raise ValueError(f"expected by to be one of {', '.join(BY)}, got {by!r}")
    split = _by_token if by == "token" else _by_component
    contributions = split(capture, operator, target)
    if capture.unembed.weights.b_U is not None:
        contributions[Source(Node.parse("b_U"))] = target.constant
    sources = tuple(contributions)
    labels = tuple(
        tuple(_label(capture, source, prompt) for source in sources)
        for prompt in range(capture.frame.batch)
    )
    return Attribution(
        torch.stack(list(contributions.values()), -1),
        sources,
        labels,
        by,
        target.name,
        target.value,
        True,
        capture.convention,
        capture.frame.spans,
    )


def _by_token(
    capture: Capture, operator: FrozenTransformer, target: Target
) -> dict[Source, Tensor]:
    frame = capture.frame
    u = frame.zeros(operator.out_dim)
    u[torch.arange(frame.batch, device=frame.device), target.query] = target.covector
    effects: dict[str, Tensor] = {}
    covector = operator.apply_t(u, effects)
    found: dict[Source, Tensor] = {}
    for name, embedding in capture.embeddings.items():
        node, shares = Node.parse(name), (covector * embedding).sum(-1)
        found |= {Source(node, pos): shares[:, pos] for pos in range(frame.n_pos)}
    return found | {Source(Node.parse(name)): e.sum(-1) for name, e in reversed(effects.items())}


def _by_component(
    capture: Capture, operator: FrozenTransformer, target: Target
) -> dict[Source, Tensor]:
    query = target.query
    effects: dict[str, Tensor] = {}
    u = target.covector[:, None]
    if capture.ln_final is not None:
        u = capture.ln_final.row(query).apply_t(u, effects)
    found: dict[Source, Tensor] = {}
    for name, embedding in capture.embeddings.items():
        found[Source(Node.parse(name))] = (take_row(embedding, query) * u).sum((-2, -1))
    for step in operator.steps:
        for branch in step.branches:
            found |= _direct(branch, step.state, query, u, effects)
        for edit in step.edits:
            effects[edit.name] = (u * take_row(edit.constant, query)).sum(-1)
    return found | {Source(Node.parse(name)): e.sum(-1) for name, e in effects.items()}


def _direct(
    branch: Branch, state: Tensor, query: Tensor, u: Tensor, effects: dict[str, Tensor]
) -> dict[Source, Tensor]:
    """⟨u, what each node of a branch adds at the query row⟩; external constants go to effects."""
    if branch.post is not None:
        u = branch.post.row(query).apply_t(u, effects)
    x = state if branch.pre is None else branch.pre.apply(state) + branch.pre.bias
    shares = (branch.body.outputs_at(x, query) @ u.mT).squeeze(-1)
    for name, constant in branch.body.outside_at(query).items():
        effects[name] = (u[:, 0] * constant).sum(-1, keepdim=True)
    nodes = branch.body.nodes()
    return {Source(node): share for node, share in zip(nodes, shares.unbind(-1), strict=True)}


def _label(capture: Capture, source: Source, prompt: int) -> str:
    if source.pos is None:
        return str(source.node)
    start, stop = capture.frame.spans[prompt]
    if not start <= source.pos < stop:
        return "padding"
    pos = source.pos - start
    if source.node.kind == "embed":
        return f"{_quote(capture.prompts.strings[prompt][pos])}@{pos}"
    return f"{source.node}@{pos}"


def _quote(text: Any) -> str:
    return '"' + str(text).replace("\n", "\\n") + '"'
