"""What was run, and a name for every row of the residual: tokens, or patches of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, cast

from jaxtyping import Float, Int
from torch import Tensor

from ..checks import spelled

EMPTY = "The prompt is empty. Give at least one token."


GATES = ("gate", "up", "half")
"""Values of ``Convention.gate``: what a gated MLP keeps fixed of its product act(g) ⊙ u."""


@spelled
@dataclass(frozen=True)
class Convention:
    """The choices that make the operator unique. Every result records them.

    A gated MLP multiplies two linear maps of its input, act(g) ⊙ u. A linear form of that product
    has to hold a factor fixed. All choices reproduce the run, but they attribute it differently.

    Attributes:
        gate: The fixed factor. "gate" fixes act(g) and is linear in u. "up" fixes u and act(g)/g
            and is linear in g. "half" takes half of each.
        first_token: The token that the host or the tokenizer put in front of a text, such as
            "<bos>"; "" where none was put there, and None where token ids were given. It belongs to
            the prompt, so conventions are equal without it.

    Raises:
        ValueError: If ``gate`` has another value.

    Example:
        >>> from tensorlens_tl import Convention
        >>> Convention()
        Convention(gate='gate', first_token=None)
        >>> Convention(gate="half").gate
        'half'
    """

    gate: str = "gate"
    first_token: str | None = field(default=None, compare=False)

    def __post_init__(self):
        if self.gate not in GATES:
            raise ValueError(f"gate={self.gate!r} is not known. Pass one of {', '.join(GATES)}.")

    @property
    def in_front(self) -> str:
        """What was put in front of the text, in words; empty where token ids were given."""
        if self.first_token is None:
            return ""
        return f"{self.first_token or 'no token'} added in front"


@dataclass(frozen=True, eq=False)
class Prompts:
    """The captured prompts: token ids, or pictures and sounds whose rows have no ids.

    Attributes:
        tokens: Token ids [batch, pos], padding included; None where the rows have none.
        spans: For every prompt, the (start, stop) of its real rows.
        strings: For every prompt, the names of its real rows: strings of tokens, "[CLS]",
            "patch[0,1]".
        inputs: What was run in place of ids, such as pixel values [batch, channel, row, column];
            None where ids were run.
        soft_prompt: Where embeddings [batch, pos, d_model] were run, the number of rows of a soft
            prompt before each prompt's tokens; 0 where all rows were given. Else None.
        added: The token that was put in front of a text; "" where none was, and None where no text
            was given.
    """

    tokens: Int[Tensor, "batch pos"] | None
    spans: tuple[tuple[int, int], ...]
    strings: tuple[tuple[str, ...], ...]
    inputs: Float[Tensor, "batch ..."] | None = None
    soft_prompt: int | None = None
    added: str | None = None

    @property
    def given(self) -> Tensor:
        """What the model was run on: the token ids, or what stands in their place."""
        return cast(Tensor, self.tokens if self.inputs is None else self.inputs)

    @property
    def n_pos(self) -> int:
        """Number of positions, padding included."""
        return self.given.shape[1] if self.by_row else max(stop for _, stop in self.spans)

    @property
    def by_row(self) -> bool:
        """Whether what was run has one entry per row: a token id, or an embedding."""
        return self.tokens is not None or self.soft_prompt is not None

    def by_source(
        self, rows: Float[Tensor, "batch pos d_model"]
    ) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """Split the rows of a run from embeddings by source: soft prompt, and tokens.

        Args:
            rows: What the model made of :attr:`inputs`.

        Returns:
            The rows of each source, which are 0 where another one stands.
        """
        n = self.soft_prompt
        if not n:
            return {"inputs_embeds": rows}
        soft = rows.new_zeros(*rows.shape[:2], 1)
        for row, (start, _) in zip(soft, self.spans, strict=True):
            row[start : start + n] = 1
        return {"embed": rows * (1 - soft), "soft_prompt": rows * soft}

    def ids(self, asked: str) -> Int[Tensor, "batch pos"]:
        """The token ids, for what cannot be answered without.

        Args:
            asked: What needs them, as the user typed it.

        Returns:
            The ids [batch, pos], padding included.

        Raises:
            ValueError: If the rows have no ids.
        """
        if self.tokens is None:
            rows = ", ".join(self.strings[0][:2])
            raise ValueError(
                f"{asked} needs token ids, and the rows of this run have none ({rows}, …). "
                "Ask it of a run on text."
            )
        return self.tokens

    def picked(
        self, rows: Sequence[int] | slice, pos: slice, spans: tuple[tuple[int, int], ...]
    ) -> Prompts:
        """Some of the prompts, at some positions, whose real rows are then at ``spans``."""
        strings = self.strings[rows] if isinstance(rows, slice) else [self.strings[r] for r in rows]
        tokens = None if self.tokens is None else self.tokens[rows, pos]
        inputs = None if self.inputs is None else self.inputs[rows]
        inputs = inputs if self.soft_prompt is None else self.given[rows, pos]
        return Prompts(tokens, spans, tuple(strings), inputs, self.soft_prompt, self.added)


def patch_names(
    n: int, height: float, width: float, first: str = "", kind: str = "patch"
) -> list[str]:
    """Name the rows of a picture: "patch[row,column]", or "patch[number]" where they fill no grid.

    Args:
        n: Number of rows in the residual.
        height: Height of the picture, in any unit; 0 if it is not known.
        width: Width of the picture, in that unit.
        first: What stands before, such as the picture's number and a comma.
        kind: What a row is called.

    Returns:
        The names, row by row of the picture.
    """
    square = n * width / height if height else 0.0
    columns = round(square**0.5)
    if columns == 0 or n % columns or abs(square - columns**2) > 1e-6:
        return [f"{kind}[{first}{k}]" for k in range(n)]
    return [f"{kind}[{first}{k // columns},{k % columns}]" for k in range(n)]


class ClassNames:
    """The classes of a classifier, called by the methods of a tokenizer: one word per class.

    Targets and tables ask a tokenizer for the names of the logits. A classifier of pictures or
    sounds has no tokenizer, and the names of its classes stand in its place.

    Args:
        names: The name of every class, by its number.
    """

    unk_token_id = None

    def __init__(self, names: Sequence[str]):
        self.names = tuple(map(str, names))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The numbers of the classes of this name: none, one, or several of the same name."""
        return [i for i, name in enumerate(self.names) if name == text]

    def decode(self, ids: Sequence[int]) -> str:
        """The names of classes, as one text."""
        return " ".join(self.names[i] for i in ids)

    def get_vocab(self) -> dict[str, int]:
        """The number of every class, by its name."""
        return {name: i for i, name in enumerate(self.names)}


def token_id(capture: Any, text: str, name: str = "target") -> int:
    """Find the id of a one-token string: as given, or else without its leading space.

    Args:
        capture: A captured run, or anything else with a ``tokenizer``.
        text: The token as a string, such as " Mary".
        name: The name of the user's argument, for messages.

    Returns:
        The id of the token.

    Raises:
        ValueError: If no tokenizer knows the string as one token; the message shows near ones.
    """
    tokenizer = capture.tokenizer
    if tokenizer is None:
        if text.startswith("#") and text[1:].isdecimal():  # as labels name tokens then
            return int(text[1:])
        raise ValueError(
            f"{name}={text!r} is a string, but the model has no tokenizer. Pass a token id, or "
            "load a saved lens with its model: load(path, model=model)."
        )
    unknown = getattr(tokenizer, "unk_token_id", None)
    pieces: list[int] = []
    for attempt in dict.fromkeys((text, text.removeprefix(" "))):
        ids = tokenizer.encode(attempt, add_special_tokens=False)
        if len(ids) == 1 and ids[0] != unknown:
            return ids[0]
        pieces = pieces or ids
    if len(pieces) <= 1 or all(piece == unknown for piece in pieces):
        words = [word.lstrip("Ġ▁") for word in tokenizer.get_vocab()]  # without marks of a space
        near = get_close_matches(text.strip(), filter(None, words))
        like = f" such as {' or '.join(map(repr, near))}" if near else ""
        if isinstance(tokenizer, ClassNames):
            raise ValueError(
                f"{name}={text!r} is no class of the model. Pass a class{like}, or its number."
            )
        model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
        whole = ", which knows whole words only" if type(model).__name__ == "WordLevel" else ""
        raise ValueError(
            f"{name}={text!r} is not known to the tokenizer{whole}. Pass a known token{like}, or a "
            "token id."
        )
    shown = ", ".join(f"{tokenizer.decode([piece])!r} #{piece}" for piece in pieces)
    if isinstance(tokenizer, ClassNames):
        raise ValueError(
            f"{name}={text!r} is the name of {len(pieces)} classes: {shown}. Pass the number."
        )
    raise ValueError(
        f"{name}={text!r} is {len(pieces)} tokens: {shown}. Pass one of them or its id, or end the "
        "prompt with them and call lens.attribute_sequence."
    )


def check_tokens(tokens: Int[Tensor, "batch pos"], n_ctx: int, d_vocab: int) -> None:
    """Refuse prompts that the model cannot take.

    Args:
        tokens: Token ids of all prompts.
        n_ctx: Number of tokens that the model's context holds.
        d_vocab: Number of tokens in the vocabulary.

    Raises:
        ValueError: If the prompt is empty, longer than n_ctx, or has ids outside the vocabulary.
    """
    if tokens.numel() == 0:
        raise ValueError(EMPTY)
    if tokens.shape[1] > n_ctx:
        raise ValueError(
            f"The prompt has {tokens.shape[1]} tokens, but the model's context holds "
            f"n_ctx = {n_ctx}. Shorten the prompt."
        )
    if wrong := tokens[(tokens < 0) | (tokens >= d_vocab)].tolist():
        raise ValueError(
            f"Token id {wrong[0]} is outside the vocabulary. Give ids from 0 to {d_vocab - 1}."
        )
