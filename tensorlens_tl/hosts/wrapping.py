"""A Bridge around a Hugging Face model: built, compared with it, given the user's tokenizer.

``snapshot`` and ``restore`` give the model back as it was before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ..checks import kind_of
from ..graph import resid_site
from ..maps import TINY
from ..readers import eager_experts
from ..refusals import (
    UnsupportedArchitectureError,
    adapter_at,
    check_architecture,
    check_weights,
    faulty_option,
    merge_first,
    not_finite,
    refusal,
)
from .bridge import BRIDGE
from .encoders import ENCODER
from .pictures import embeddings_of, random_input
from .seeing import senses, tower_norms
from .tokens import CONVENTION

_HEADED = {
    "BertModel": "BertForMaskedLM",
    "RobertaModel": "RobertaForMaskedLM",
    "XLMRobertaModel": "RobertaForMaskedLM",
}
"""Encoders without a head, and the class with a head and the same blocks that hosts know."""

BEFORE = "_tensorlens_before"
"""Attribute of such a model that holds what it was before."""

_GIVEN = "_tensorlens_tokenizer"
"""Attribute of a wrapped model: the tokenizer that the user gave, and what it was like then."""


def build_bridge(model: Any, build: Callable[[], Any]) -> Any:
    """Wrap a Hugging Face model, and compare its logits before and after.

    Args:
        model: The Hugging Face model.
        build: Function without arguments that builds the Bridge around the model.

    Returns:
        The Bridge around the model, in the same mode (training or evaluation).

    Raises:
        ValueError: If the model is inside another Bridge, or its logits are not finite.
        UnsupportedArchitectureError: If the Bridge cannot be built or run, or gives other logits.
            The model is then as it was.
    """
    name = type(model).__name__
    if any(type(module).__module__.startswith("transformer_lens.") for module in model.modules()):
        raise ValueError(
            f"This {name} is inside a TransformerBridge already, which wrap did not make. "
            "Pass that Bridge in its place."
        )
    check_architecture(name, model)
    check_weights(model.named_modules())
    adapted, (what, remedy) = adapter_at(model), faulty_option(name, model.config)
    before = snapshot(model)
    kept = [(module, module.training) for module in model.modules()]
    pixels = embeddings_of(model) is not None and not senses(model)
    ids = random_input(model) if pixels else _probe_ids(model)
    devices = {p.device for p in model.parameters() if p.is_cuda}
    mixtures = [module for module in model.modules() if hasattr(module, "_apply_gate")]
    try:
        failing = "the model itself does not run"
        try:
            # A Bridge draws the weights that it then replaces.
            with torch.random.fork_rng(devices), eager_experts(mixtures):
                with _at_rest(model):
                    found = model(ids)
                    expected = getattr(found, "logits", found[0])
                failing = (
                    f"transformer_lens {metadata.version('transformer_lens')} cannot bridge it"
                )
                bridge = build()
                for norm in tower_norms(bridge):  # by the model's own ε, as transformer_lens 4 does
                    norm.use_native_layernorm_autograd = True
                with _at_rest(model, bridge):
                    off, rounding = _difference(model, bridge, ids, expected)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0].split(". ")[0].rstrip(".: ")
            raise UnsupportedArchitectureError(
                refusal(what, f"{failing} ({reason})", remedy)
            ) from error
        if not off <= rounding:
            if adapted:
                raise UnsupportedArchitectureError(merge_first(adapted))
            if not expected.isfinite().all():
                raise ValueError(not_finite("logits", model))
            why = (
                f"its Bridge gives logits that differ from Hugging Face's by {off:.1e} of the "
                f"largest, where rounding explains {rounding:.0e}"
            )
            raise UnsupportedArchitectureError(refusal(what, why, remedy))
    except BaseException:
        restore(before)
        raise
    finally:
        for module, training in kept:
            module.training = training
    vars(model)[BRIDGE], vars(model)[BEFORE] = bridge, before  # not among the submodules
    vars(model)["save_pretrained"] = _no_saving
    return bridge


def _no_saving(*args: Any, **kwargs: Any) -> None:
    """Stand for ``save_pretrained`` until ``unwrap``: the Bridge renames what would be saved."""
    raise ValueError(
        "This model is inside a TransformerBridge, which has renamed its weights. Call "
        "tensorlens_tl.unwrap(model) first; what it returns can be saved."
    )


def _probe_ids(model: Any) -> Tensor:
    """Eight random ids, or as many as the model has positions for [1, pos]."""
    config, weight = model.config, model.get_input_embeddings().weight
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    room = min([8, *(int(getattr(config, n, None) or 8) for n in names)])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(weight), (1, room), generator=generator, device="cpu")
    return ids.to(weight.device)


def within_head(model: Any) -> Any:
    """Put an encoder without a head into the class with a head that the host knows.

    Args:
        model: A Hugging Face encoder, such as a BertModel. It is used as it is, not copied.

    Returns:
        The model around it, whose head passes on what the encoder gives. Another model as it is.
    """
    if (name := _HEADED.get(type(model).__name__)) is None:
        return model
    import transformers

    tiny = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 2}
    tiny |= {"num_hidden_layers": 1, "max_position_embeddings": 4, "pad_token_id": 0}
    config = deepcopy(model.config)
    for option, value in tiny.items():  # of weights that are never used
        setattr(config, option, value)
    with torch.random.fork_rng([]):
        whole = getattr(transformers, name)(config)
    setattr(whole, whole.base_model_prefix, model)
    whole.config = model.config
    weight = model.get_input_embeddings().weight
    head = whole.cls if hasattr(whole, "cls") else whole.lm_head
    head.to(weight.device, weight.dtype).train(model.training)
    whole.training = model.training
    head.forward = lambda hidden, **_: hidden
    vars(whole)[ENCODER] = model, head
    return whole


@contextmanager
def _at_rest(*models: Any) -> Iterator[None]:
    """Run models without dropout and without a graph."""
    modules = {id(m): m for model in models for m in model.modules()}.values()
    modes = [(module, module.training) for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _difference(model: Any, bridge: Any, ids: Tensor, expected: Tensor) -> tuple[float, float]:
    """Compare a Bridge with what the model gave: max |Δ logits|, and what rounding explains.

    Both are relative to the largest logit. A Bridge computes the same in another order, so every
    number may round another way. What that does depends on the model: it may amplify one feature.
    So it is measured. Every embedding, and what enters the first block, is moved by its last digit,
    and the logits move by n. The last digit is that of the coarsest dtype in the model, or of
    float32 where that is coarser, as hosts compute norms, softmax and rotations in float32. In half
    precision, the move changes all roundings after it, as another order does: 4 n is allowed. In
    float32 and float64 it may be one rounding for the many of a deep model, and n is small: 32 n is
    allowed.

    Args:
        model: The Hugging Face model, inside the Bridge.
        bridge: The Bridge around it, at rest.
        ids: Token ids [1, pos].
        expected: Logits that the model gave before it was wrapped [1, pos, d_vocab].

    Returns:
        The difference and the largest that rounding explains.
    """
    dtypes = {torch.float32} | {p.dtype for p in model.parameters() if p.is_floating_point()}
    digit = max(torch.finfo(dtype).eps for dtype in dtypes)
    times = 4 if digit > 1e-4 else 32
    found = bridge(ids, return_type="logits")
    size = expected.masked_fill(~expected.isfinite(), 0).abs().max().clamp_min(TINY)
    off, rounding = _largest(found - expected, found, expected) / size, times * digit
    if off > rounding:

        def move(module: Any, args: Any, output: Tensor) -> Tensor:
            signs = torch.ones_like(output)
            signs[..., ::2] = -1
            return output * (1 + digit * signs)

        points = model.get_input_embeddings(), bridge.hook_dict[resid_site(0, "pre")]
        moving = [point.register_forward_hook(move) for point in points]
        try:
            moved = bridge(ids, return_type="logits")
        finally:
            for hook in moving:
                hook.remove()
        rounding = max(rounding, times * float(_largest(moved - found, moved, found) / size))
    return float(off), rounding


def _largest(difference: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The largest difference; none where both are NaN, or the same infinity."""
    same = (a == b) | (a.isnan() & b.isnan())  # a later check tells of NaN
    return difference.masked_fill(same, 0).abs().nan_to_num(torch.inf).max()


# --- The model as it was before

Before = list[tuple[Any, type, dict[str, tuple[Any, Any]]]]
"""Modules and configurations of a model, each with its class and its attributes.

An attribute is kept with a copy of its entries where it is a dictionary, and with None elsewhere.
"""


def snapshot(model: Any) -> Before:
    """Keep what a Bridge may change of a model: submodules, hooks, methods, configuration."""
    held = {id(m): m for module in model.modules() for m in (module, vars(module).get("config"))}
    return [
        (m, type(m), {k: (v, dict(v) if isinstance(v, dict) else None) for k, v in vars(m).items()})
        for m in held.values()
        if m is not None
    ]


def restore(before: Before) -> None:
    """Give a model back what :func:`snapshot` kept. Weights stay as they are now."""
    for held, kind, attributes in before:
        held.__class__ = kind
        now = vars(held)
        for name in now.keys() - attributes.keys():
            del now[name]
        for name, (value, entries) in attributes.items():
            if name in ("_parameters", "_buffers"):
                tensors = now[name]
                entries = {
                    k: v if v is None or tensors.get(k) is None else tensors[k]
                    for k, v in entries.items()
                }
            if entries is not None:  # the same dictionary, to which handles of hooks refer
                value.clear()
                value.update(entries)
            if name != "training":
                now[name] = value


# --- The tokenizer of a wrapped model


def give_tokenizer(bridge: Any, tokenizer: Any) -> None:
    """Give a wrapped model the user's own tokenizer, under the host's convention.

    The host would load the tokenizer again from where it came from, without what was added to it
    since, and fails where it came from nowhere. Here it gets a copy of the tokenizer as it is, with
    the special tokens that the host needs. The user's own tokenizer is not touched.

    Args:
        bridge: The Bridge that :func:`tensorlens_tl.wrap` made.
        tokenizer: A tokenizer of ``transformers``.

    Raises:
        ValueError: If it is no such tokenizer.
    """
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"tokenizer is {kind_of(tokenizer)}, and not a tokenizer of transformers. Pass "
            "one, such as PreTrainedTokenizerFast(tokenizer_object=...) around a Tokenizer."
        )
    probe = _probe(tokenizer)
    plain, own = (tokenizer.encode(probe, add_special_tokens=s) for s in (False, True))
    about = len(tokenizer), tokenizer.padding_side, str(tokenizer.special_tokens_map), own
    known, before, told, given = vars(bridge).get(_GIVEN, (None,) * 4)
    if known is tokenizer and before == about and bridge.tokenizer is given:
        return
    # 1. What the tokenizer itself puts before and after a text.
    start = next((i for i in range(len(own)) if own[i : i + len(plain)] == plain), 0)
    first, last = own[:start], own[start + len(plain) :]
    # 2. The special tokens that the host needs, in a copy.
    copy, cfg = deepcopy(tokenizer), bridge.cfg
    copy.padding_side = getattr(cfg, "default_padding_side", None) or copy.padding_side or "right"
    if copy.bos_token is None:
        copy.bos_token = tokenizer.decode(first) if len(first) == 1 else copy.eos_token
    if copy.pad_token is None:
        copy.add_special_tokens({"pad_token": str(copy.eos_token or "<pad>")})
    bos = copy.bos_token_id
    if not first and bos is not None and hasattr(copy, "add_bos_token"):
        # The host would write the token into the text, which can change how the text is cut.
        changed = deepcopy(copy)
        with suppress(ValueError, TypeError):  # a token that its post-processor cannot name
            changed.add_bos_token = True
            copy = changed if changed.encode(probe) == [bos, *own] else copy
    cfg.tokenizer_prepends_bos = bos is not None and copy.encode(probe)[:1] == [bos]
    cfg.tokenizer_appends_eos = bool(last) and last[-1] == copy.eos_token_id
    # 3. From None on, the host takes a tokenizer as it is, and keeps the size of the vocabulary.
    bridge.tokenizer = None
    bridge.tokenizer = copy
    # 4. What differs from the tokenizer's own ids.
    ids, how = bridge.to_tokens(probe)[0].tolist(), "token ids"
    for flag in (False, True):
        if bridge.to_tokens(probe, prepend_bos=flag)[0].tolist() == own:
            how = f"prepend_bos={flag}"
    host, itself = ([tokenizer.decode([i]) for i in row] for row in (ids, own))
    text = (
        f"TransformerLens reads {probe!r} as the tokens {host}, and the tokenizer itself as "
        f"{itself}. Pass {how} for the tokenizer's own."
    )
    new = text != told or vars(bridge).get(CONVENTION) == text  # or not told yet
    vars(bridge)[CONVENTION] = text if ids != own and new else None
    vars(bridge)[_GIVEN] = tokenizer, about, text, bridge.tokenizer


def _probe(tokenizer: Any) -> str:
    """A text that the tokenizer has ordinary tokens for."""

    def texts() -> Iterator[str]:
        yield "a"
        words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
        yield from sorted(words, key=lambda text: (not text.isalpha(), text))

    for text in texts():
        with suppress(Exception):  # the tokenizers library raises no class of its own
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids and tokenizer.unk_token_id not in ids:
                return text
    raise ValueError("The tokenizer knows no text. Pass token ids.")
