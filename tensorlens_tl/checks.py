"""Checks and small tools that several rooms share. No torch at import."""

from __future__ import annotations

import math
import os
import re
import reprlib
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from inspect import isfunction, signature
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard, TypeVar, cast

Thing = TypeVar("Thing")


def no_autocast(kind: str) -> None:
    """Refuse to compute where torch.autocast would round every product.

    Args:
        kind: Type of the device, such as "cpu" or "cuda".

    Raises:
        ValueError: If autocast is on for this device.
    """
    import torch

    if kind != "meta" and torch.is_autocast_enabled(kind):
        raise ValueError(
            "torch.autocast is on, which would round every product. Leave the torch.autocast "
            "block; to run a model in half precision, cast it with model.to(dtype)."
        )


def need(module: str, extra: str, for_what: str) -> Any:
    """Import an optional package, or say how to install it.

    Args:
        module: Name of the module, such as "scipy.sparse.linalg".
        extra: Extra of this library that installs the package.
        for_what: Name of what was called, such as "to_dataframe".

    Returns:
        The imported module.

    Raises:
        ValueError: If the package is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        raise ValueError(
            f"{for_what} needs the package {module.split('.')[0]}. "
            f"Install it with pip install 'tensorlens-tl[{extra}]'."
        ) from None


def as_device(device: Any) -> Any:
    """Return ``device`` as a ``torch.device``; refuse what is none."""
    import torch

    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(
            f'device={device!r} is no device of PyTorch. Pass one such as "cpu" or "cuda".'
        ) from None


def usable_device(device: Any) -> Any:
    """Return a device of this machine as tensors there name it, such as cuda:0; refuse any other.

    Args:
        device: A name or a ``torch.device``.

    Returns:
        The device, with the number that "cuda" leaves out.

    Raises:
        ValueError: If there is no such device here.
    """
    import torch

    try:
        return torch.empty(0, device=as_device(device)).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"device={str(device)!r} cannot be used: {reason}. Pass a device of this machine."
        ) from None


def file_path(path: Any, name: str = "path") -> Path:
    """Return ``path`` as a Path; refuse it, calling it ``name``, unless it is text or a path."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"{name}={path!r} is not a path. Pass a string or a pathlib.Path.")
    return Path(path)


def new_file(path: Any) -> Path:
    """Return where ``path`` leads to; refuse it unless it is a file in a folder that exists."""
    file = Path(os.path.realpath(file_path(path)))  # a link stays one, and its file is written
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(
            f"path={str(path)!r} cannot be written. Pass a file in a folder that exists."
        )
    return file


def is_int(number: object) -> TypeGuard[int]:
    """Tell whether a number is an integer. NumPy's integers are; True is not."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def kind_of(given: object) -> str:
    """Name the type of what a user passed, with its article: "an int", "a list"."""
    name = type(given).__name__
    return "None" if given is None else f"a{'n' * (name[0].lower() in 'aeiou')} {name}"


def nearest(
    name: str, known: Iterable[str], cutoff: float = 0.6, shortened: bool = True
) -> str | None:
    """The known name that a misspelt or shortened one stands for; None where none is near."""
    known = list(known)
    if close := get_close_matches(name.lower(), known, 1, cutoff):
        return close[0]
    if len(name) < 2 or not shortened:
        return None
    short = ((other, iter(other)) for other in known if other[0] == name[0])
    return next((other for other, rest in short if all(c in rest for c in name)), None)


class Hinted:
    """A class that says what a guessed name of an attribute stands for."""

    _MEANT: ClassVar[Mapping[str, str]] = {}
    """What guessed names stand for: another attribute, or a call in words."""

    if not TYPE_CHECKING:  # a type checker must still know which attributes there are

        def __getattr__(self, name: str) -> Any:
            kind = type(self)
            if name.startswith("_") or hasattr(kind, name):
                return object.__getattribute__(self, name)  # raises the error that led here
            known = [other for other in dir(kind) if not other.startswith("_")]
            meant = self._MEANT.get(name) or nearest(name, known, 0.75)
            if meant is None or (meant.isidentifier() and meant not in known):
                meant = "a name that dir() lists"
            raise AttributeError(
                f"{kind.__name__!r} object has no attribute {name!r}. Use {meant}."
            )


def unfit(call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Say how some arguments do not fit a call, and what to do.

    Args:
        call: The function or method.
        args: What would be given by position.
        kwargs: What would be given by name.

    Returns:
        The message, in two sentences, or "" where they fit.
    """
    own = signature(call)
    parts = getattr(call, "__qualname__", "").split(".")
    title = parts[-2] if parts[-1] == "__init__" else parts[-1]
    names = [name for name in own.parameters if name not in ("self", "cls")]
    passed_on = any(p.kind is p.VAR_KEYWORD for p in own.parameters.values())
    for name in kwargs.keys() - own.parameters.keys():
        # What is passed on is not known here, but a slip of the pen is.
        meant = nearest(name, names, 0.8 if passed_on else 0.6)
        if meant in kwargs:
            meant = None
        if passed_on and (meant is None or len(name) < 4):
            continue
        known = f"Use {', '.join(names)}." if names else "Call it without arguments."
        hint = f"Did you mean {meant}=?" if meant else known
        return f"There is no argument {name}= of {title}. {hint}"
    try:
        own.bind(*args, **kwargs)
    except TypeError as error:
        known = f"Its arguments are {', '.join(names)}." if names else "It takes no arguments."
        return f"The call does not fit {title}: {error}. {known}"
    return ""


def spelled(thing: Thing) -> Thing:
    """Make a public function refuse misspelt, missing and superfluous arguments by ValueErrors.

    Args:
        thing: A function; or a class, whose constructor and public methods become such functions.

    Returns:
        The function that does so, or the class.
    """
    if not isinstance(thing, type):
        return cast(Thing, _spelled(cast(Any, thing)))
    for name, member in list(vars(thing).items()):
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(member, classmethod | staticmethod):
            setattr(thing, name, type(member)(_spelled(member.__func__)))
        elif isfunction(member):
            setattr(thing, name, _spelled(member))
    return thing


def _spelled(call: Callable[..., Any]) -> Callable[..., Any]:
    passed_on = any(p.kind is p.VAR_KEYWORD for p in signature(call).parameters.values())

    @wraps(call)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if passed_on and kwargs and (problem := unfit(call, args, kwargs)):
            raise ValueError(problem)
        try:
            return call(*args, **kwargs)
        except TypeError:
            if problem := unfit(call, args, kwargs):
                raise ValueError(problem) from None
            raise

    return checked


def whole(number: Any, name: str) -> int:
    """Return ``number`` as an int; refuse it, calling it ``name``, unless it is an integer."""
    if not is_int(number):
        raise ValueError(f"{name}={number!r} is not an integer. Pass a whole number, such as 0.")
    return int(number)


def at_least_one(number: Any, name: str) -> int:
    """Return ``number`` as an int; refuse it, calling it ``name``, unless it is an integer ≥ 1."""
    if not is_int(number) or number < 1:
        raise ValueError(f"{name}={number!r} is not an integer ≥ 1. Pass a positive whole number.")
    return int(number)


def finite(number: Any, name: str) -> float:
    """Return ``number`` as a float; refuse it, calling it ``name``, unless it is one finite number.

    Args:
        number: A number of Python's or NumPy's, or a tensor without dimensions.
        name: Name of the argument.

    Returns:
        The same number as a float.

    Raises:
        ValueError: If it is none, or is nan or infinite.
    """
    given = number.item() if getattr(number, "ndim", None) == 0 else number
    real = isinstance(given, Real) and not isinstance(given, bool)
    if not real or not abs(cast(float, given)) < math.inf:
        shown = " ".join(reprlib.repr(number).split())
        raise ValueError(f"{name}={shown} is not a finite number. Pass one such as 1.0.")
    return float(cast(float, given))


def as_list(given: Any) -> Any:
    """Turn ids or strings in a row into a list; return a direction, or anything else, as is."""
    import torch

    if not isinstance(given, str | bytes | tuple) and isinstance(given, Sequence):
        return list(given)  # a column of a data set, too
    if getattr(given, "ndim", 0) != 1:
        return given
    try:
        direction = torch.as_tensor(given).is_floating_point()
    except (TypeError, ValueError, RuntimeError):  # an array of strings, or a column of a table
        direction = False
    return given if direction else cast(Any, given).tolist()


def no_table(given: Any, name: str) -> Any:
    """Return ``given``; refuse a table, which gives the names of its columns in place of rows."""
    if hasattr(given, "columns"):
        raise ValueError(f"{name} is {kind_of(given)}, a table. Pass one of its columns.")
    return given


def one_each(given: Any, n: int, name: str) -> list[Any]:
    """Return one value per prompt: the n values of a list, or of ids [n], or one value n times."""
    given = as_list(given)
    if not isinstance(given, list | tuple):
        return [given] * n
    if len(given) != n:
        raise ValueError(
            f"{name} has {len(given)} entries for {n} prompts. Pass one for each, or one for all."
        )
    return list(given)


def pick_prompts(given: Any, n: int, what: str, rows: str) -> range:
    """Return the numbers of the prompts that an index or a slice picks.

    Args:
        given: What stands in the brackets.
        n: Number of prompts.
        what: Name of what is indexed, such as "attribution".
        rows: Names of the methods that read rows, for the message.

    Returns:
        At least one number from 0 to n − 1.

    Raises:
        IndexError: If there is no such prompt. Loops end by it.
        ValueError: If ``given`` is neither an integer nor a slice, or picks no prompt.
    """
    if is_int(given):
        if not -n <= given < n:
            raise IndexError(f"There is no prompt {given}. The number of prompts is {n}.")
        return range(given % n, given % n + 1)
    if not isinstance(given, slice):
        raise ValueError(
            f"{what}[{given!r}] does not exist, as the index is a prompt's number or a slice. "
            f"For rows use {rows}."
        )
    try:
        found = range(n)[given]
    except (TypeError, ValueError):  # a slice of no integers, or with step 0
        found = range(0)
    if not found:
        raise ValueError(f"{what}[{given}] holds no prompt. Take a slice such as [:{n}].")
    return found


def as_array(tensor: Any, dtype: Any = None, copy: bool | None = None) -> Any:
    """Give a tensor to NumPy: a copy, so that writing to it leaves the tensor as it is.

    Args:
        tensor: Numbers on any device.
        dtype: NumPy's dtype of the array. None keeps the tensor's.
        copy: NumPy's own argument. False shares the memory.

    Returns:
        The numbers as an array on the CPU.
    """
    array = tensor.detach().cpu().numpy()
    return array.astype(array.dtype if dtype is None else dtype, copy=copy is not False)


PROGRESS_AFTER = 2.0
"""Seconds of work after which a progress bar is shown."""


def progress_bar(what: str, total: int | None, shown: bool = True, **options: Any) -> Any:
    """Make a bar on standard error. It appears after 2 s of work, and goes when the work is done.

    Args:
        what: Name of what is counted, such as "prompts".
        total: How many there are; None where that is not known.
        shown: Whether to show it at all.
        **options: Further arguments of tqdm, such as ``initial`` or ``unit``.

    Returns:
        The bar, to be used in a ``with`` statement and moved by ``update``.
    """
    from tqdm.auto import tqdm

    return tqdm(
        desc=what, total=total, delay=PROGRESS_AFTER, leave=False, disable=not shown, **options
    )


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: ``write`` fills a new file, which then takes its place."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(unfinished)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())  # the data must be on disk before the name points to them
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def bound(call: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Fit the arguments that a user gave for a call, with the call's own defaults.

    Args:
        call: The function or method that would be called.
        arguments: The arguments by name.

    Returns:
        Every argument of the call by name.

    Raises:
        ValueError: If one is missing or not known.
    """
    if problem := unfit(call, (), arguments):
        raise ValueError(problem)
    given = signature(call).bind(**arguments)
    given.apply_defaults()
    return given.arguments


def token_text(tokenizer: Any, token: int) -> str:
    """A token as text; "#" and its id where there is no tokenizer."""
    return f"#{token}" if tokenizer is None else tokenizer.decode([token])


_NO_TOKEN = re.compile(r"(patch|film|sound|inputs_embeds|soft_prompt)\[\d+(,\d+)*\]")
"""What stands at a position that holds no token."""


def place_label(token: str, pos: int) -> str:
    """The name of a token in its place, such as '"is"@5', on one line; 'patch[2,3]' as it is."""
    text = str(token).replace("\n", "\\n")
    if _NO_TOKEN.fullmatch(text):
        return text
    return f'"{text}"@{pos}'
