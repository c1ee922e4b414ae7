"""Situations in which a user may call the library, drawn at random, and what must come of each.

A situation is a row of choices. Every choice is a name in a table here. The tables and
``objections`` tell which choices are wrong, and which words a refusal of them may use:

    must be refused      the run cannot be what the user meant: an empty prompt, NaN weights
    may be refused       served exactly, or refused by name: output_attentions, a hook of one's own
    nothing objected     served exactly; a refusal of such a situation is a fault

What is exact is told by the plain model: a twin with the same weights that the library never meets,
called on each prompt alone, on the token ids that the user's own tokenizer gives.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from hypothesis import strategies as st
from models import BRIDGE, D_VOCAB, HOOKED, N_CTX, HookedTransformer, build_bridge_from_module
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, PreTrainedTokenizerFast

import tensorlens_tl
from tensorlens_tl.support.tiny_models import build_hf, build_hooked, quiet

FAMILIES = ("llama", "gpt2", "neox", "gemma2", "qwen3")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
_HF_WAYS = ("hf", "wrapped", "wrapped twice", "wrapped, method") if build_bridge_from_module else ()
_HOOKED_WAYS = ("hooked", "hooked, method") if HookedTransformer else ()
_LOAD_WAYS = ("load_model",)
WAYS = (*_HF_WAYS, *_HOOKED_WAYS, *_LOAD_WAYS)

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Of numbers, relative to the largest logit or the sum of the rows' sizes, by dtype."""


# --- The choices ----------------------------------------------------------------------------------

TOKENIZERS = ("none", "BOS", "no BOS", "pad = BOS", "added token", "in memory")

Given = tuple[Any, dict[str, Any]]
"""What is passed: the input, and arguments that go with it."""


@dataclass(frozen=True)
class Prompt:
    """A kind of input: how to make it of rows of ids or texts, and what is wrong with it."""

    make: Callable[[list[list[int]]], Given]
    rows: str = "one"  # how many prompts: "one", "equal" lengths, "ragged", or "wrong"
    text: bool = False
    masked: bool = False
    wrong: str = ""  # the words of the refusal
    may: str = ""  # the words of a refusal that is allowed


def words(rows: list[list[int]]) -> list[str]:
    return [" ".join(f"w{i}" for i in row) for row in rows]


def padded(rows: list[list[int]], side: str, pad: int = 1) -> tuple[Tensor, Tensor]:
    """Ids and mask [batch, pos] of rows of several lengths."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    return ids, mask


def masked(side: str, of_ids: Callable[[Tensor], Any], of_mask: Callable[[Tensor], Any]) -> Any:
    def make(rows: list[list[int]]) -> Given:
        ids, mask = padded(rows, side)
        return of_ids(ids), {"attention_mask": of_mask(mask)}

    return Prompt(make, "ragged", masked=True)


def encoding(rows: list[list[int]]) -> Given:
    ids, mask = padded(rows, "right")
    return BatchEncoding({"input_ids": ids, "attention_mask": mask}), {}


def no_prompt(given: Any, wrong: str, **kwargs: Any) -> Prompt:
    return Prompt(lambda rows: (given, kwargs), "wrong", wrong=wrong)


def _gap(rows: list[list[int]]) -> Given:
    mask = torch.ones(1, len(rows[0]) + 2)
    mask[0, 1] = 0
    return [[5, *rows[0], 6]], {"attention_mask": mask.long()}


PROMPTS: dict[str, Prompt] = {
    "string": Prompt(lambda rows: (words(rows)[0], {}), text=True),
    "strings": Prompt(lambda rows: (words(rows), {}), "ragged", text=True),
    "tuple of strings": Prompt(lambda rows: (tuple(words(rows)), {}), "ragged", text=True),
    "generator": Prompt(
        lambda rows: (iter(words(rows)), {}), "ragged", text=True, may="generator|iterator"
    ),
    "ids": Prompt(lambda rows: (rows[0], {})),
    "tuple of ids": Prompt(lambda rows: (tuple(rows[0]), {})),
    "tensor [pos]": Prompt(lambda rows: (torch.tensor(rows[0]), {})),
    "tensor [1, pos]": Prompt(lambda rows: (torch.tensor(rows[:1]), {})),
    "tensor [batch, pos]": Prompt(lambda rows: (torch.tensor(rows), {}), "equal"),
    "int32 tensor": Prompt(lambda rows: (torch.tensor(rows, dtype=torch.int32), {}), "equal"),
    "array": Prompt(lambda rows: (np.array(rows), {}), "equal"),
    "lists": Prompt(lambda rows: (rows, {}), "equal"),
    "list of tensors": Prompt(lambda rows: ([torch.tensor(r) for r in rows], {}), "equal"),
    "list of arrays": Prompt(lambda rows: ([np.array(r) for r in rows], {}), "equal"),
    "BatchEncoding": Prompt(encoding, "ragged", masked=True),
    "left, long mask": masked("left", lambda x: x, lambda m: m),
    "left, bool mask": masked("left", lambda x: x, lambda m: m.bool()),
    "right, int32 mask": masked("right", lambda x: x, lambda m: m.int()),
    "right, list mask": masked("right", lambda x: x.tolist(), lambda m: m.tolist()),
    "left, array mask": masked("left", lambda x: x.numpy(), lambda m: m.numpy()),
    "right, bool array mask": masked("right", lambda x: x, lambda m: m.bool().numpy()),
    "right, float mask": replace(
        masked("right", lambda x: x, lambda m: m.float()), may="attention_mask"
    ),
    "no prompt": no_prompt([], "empty"),
    "empty ids": no_prompt(torch.zeros(1, 0).long(), "empty"),
    "empty text": no_prompt("", "empty|no tokenizer"),
    "an empty text among others": no_prompt(["w5", ""], "empty|no tokenizer"),
    "ragged lists": no_prompt([[5, 6], [7]], "rectangle|one length|ragged"),
    "ragged tensors": no_prompt([torch.tensor([5, 6]), torch.tensor([7])], "rectangle|one length"),
    "floats": no_prompt([[0.5, 1.0]], "no token ids"),
    "embeddings of another width": no_prompt(torch.zeros(1, 2, 7), "no token ids|inputs_embeds"),
    "bools": no_prompt(torch.tensor([[True, False]]), "no token ids"),
    "None": no_prompt(None, "[Ii]nput"),
    "a dict": no_prompt({"prompt": "w5"}, "[Ii]nput"),
    "bytes": no_prompt(b"w5 w6", "[Ii]nput"),
    "text and ids": no_prompt(["w5", [5, 6]], "[Ii]nput"),
    "one id": no_prompt(7, "[Ii]nput"),
    "outside": no_prompt([[5, D_VOCAB, 6]], "outside the vocabulary"),
    "negative": no_prompt([[5, -1, 6]], "outside the vocabulary"),
    "too long": Prompt(lambda rows: (rows, {})),
    "mask of another shape": no_prompt(
        [[5, 6, 7]], "attention_mask", attention_mask=torch.ones(1, 2).long()
    ),
    "mask with a gap": Prompt(_gap, "wrong", wrong="attention_mask"),
    "mask of nothing": no_prompt([[5, 6]], "attention_mask", attention_mask=[[0, 0]]),
    "mask of words": no_prompt([[5, 6]], "attention_mask", attention_mask="all"),
}


@dataclass(frozen=True)
class Flag:
    """Arguments of the call beside the input, and what is wrong with them."""

    give: dict[str, Any]
    wrong: str = ""
    may: str = ""


FLAGS: dict[str, Flag] = {
    "nothing": Flag({}),
    'gate="up"': Flag({"gate": "up"}),
    'gate="half"': Flag({"gate": "half"}),
    "recomputed": Flag({"pattern": "recomputed"}),
    "dtype=float64": Flag({"dtype": torch.float64}),
    "dtype=float32": Flag({"dtype": torch.float32}),
    "noise_floor": Flag({"noise_floor": True}),
    "prepend_bos": Flag({"prepend_bos": True}),
    "no prepend_bos": Flag({"prepend_bos": False}),
    "padding_side=left": Flag({"padding_side": "left"}),
    "padding_side=right": Flag({"padding_side": "right"}),
    "use_cache": Flag({"use_cache": True}, may="use_cache"),
    "no use_cache": Flag({"use_cache": False}, may="use_cache"),
    "output_attentions": Flag({"output_attentions": True}, may="output_attentions"),
    "labels": Flag({"labels": "counted"}, may="labels"),
    "token_type_ids": Flag({"token_type_ids": "counted"}, may="token_type_ids"),
    "position_ids": Flag({"position_ids": "counted"}),
    "return_dict": Flag({"return_dict": False}, may="return_dict"),
    "return_type": Flag({"return_type": None}, wrong="return_type"),
    "stop_at_layer": Flag({"stop_at_layer": 1}, wrong="stop_at_layer"),
    "logits_to_keep": Flag({"logits_to_keep": 1}, wrong="logits_to_keep"),
    "inputs_embeds": Flag({"inputs_embeds": torch.zeros(1, 2, 32)}, wrong="inputs_embeds"),
    "a misspelt argument": Flag({"prepend_boss": True}, wrong="prepend_boss"),
    'gate="both"': Flag({"gate": "both"}, wrong="gate"),
    "gate=None": Flag({"gate": None}, wrong="gate"),
    'pattern="kept"': Flag({"pattern": "kept"}, wrong="pattern"),
    "dtype=float16": Flag({"dtype": torch.float16}, wrong="dtype"),
    'dtype="float64"': Flag({"dtype": "float64"}, wrong="dtype"),
    "dtype=int64": Flag({"dtype": torch.int64}, wrong="dtype"),
    "padding_side=middle": Flag({"padding_side": "middle"}, wrong="padding_side"),
}
_PER_TOKEN = ("labels", "token_type_ids", "position_ids")
_HF_ONLY = ("use_cache", "output_attentions", "labels", "token_type_ids", "position_ids")
_HF_ONLY += ("return_dict", "logits_to_keep", "inputs_embeds")


@dataclass(frozen=True)
class Around:
    """What surrounds the call: a mode, a state of the model, or what becomes of the lens."""

    wrong: str = ""
    may: str = ""
    ways: tuple[str, ...] = WAYS
    families: tuple[str, ...] = FAMILIES
    fresh: bool = False  # needs a model of its own, as it is changed for good
    broken: bool = False  # the plain model does not run, or gives other numbers


_OWN = (*_HF_WAYS, *_HOOKED_WAYS)
_SPLIT = ("llama", "gemma2", "qwen3")  # families with a linear layer each for q, k and v
_LINEAR = (*_SPLIT, "neox")
_WRITTEN = "written|changed|not those|not the one"
AROUND: dict[str, Around] = {
    "nothing": Around(),
    "no_grad": Around(),
    "inference_mode": Around(),
    "inference_mode, asked outside": Around(),
    "autocast": Around(wrong="autocast"),
    "train mode": Around(),
    "frozen weights": Around(),
    "float64 by default": Around(),
    "another prompt first": Around(),
    "another tokenizer first": Around(),
    "a device map": Around(ways=_HF_WAYS),
    "a deep copy of the model": Around(ways=("hf", *_HOOKED_WAYS), fresh=True),
    "a hook that looks": Around(),
    "a hook that edits": Around(),
    "a torch hook that looks": Around(may="hook", ways=_HF_WAYS, fresh=True),
    "a torch hook that edits": Around(may="hook", ways=_HF_WAYS, fresh=True),
    "two threads": Around(may="thread"),
    "a deep copy of the lens": Around(),
    "a pickled lens": Around(),
    "weights on meta": Around("meta|offload", ways=_OWN, fresh=True, broken=True),
    "a quantized layer": Around("quantized", "", _HF_WAYS, _LINEAR, fresh=True),
    "an adapter at q": Around("", "adapter|LoRA", _HF_WAYS, _SPLIT, fresh=True),
    "an adapter at v": Around("adapter|LoRA", "", _HF_WAYS, _SPLIT, fresh=True),
    "a NaN weight": Around("finite|NaN", ways=_OWN, fresh=True, broken=True),
    "weights written to": Around(_WRITTEN, ways=_OWN, fresh=True, broken=True),
    "weights written to by .data": Around(_WRITTEN, ways=_OWN, fresh=True, broken=True),
    "weights converted": Around("", _WRITTEN, _OWN, fresh=True, broken=True),
    "logits written to": Around("written"),
}

QUESTIONS = (
    *("token", "component", "head", "neuron", "layer", "constant", "dimension", "order", "edge"),
    *("token_scores", "save and load", "operator row", "one prompt", "many", "versus", "logits"),
)


@dataclass(frozen=True)
class Situation:
    """One row of choices."""

    family: str
    dtype: torch.dtype
    way: str
    prompt: str
    tokenizer: str
    flag: str
    around: str
    question: str
    seed: int

    @property
    def is_hf(self) -> bool:
        return self.way in _HF_WAYS

    @property
    def is_bridge(self) -> bool:
        return self.is_hf or (self.way in _LOAD_WAYS and bool(build_bridge_from_module))


@st.composite
def situations(draw: Any, families: tuple[str, ...] = FAMILIES) -> Situation:
    """Draw a situation: of a flag and of a surrounding, half of the time one or both are plain."""
    way = draw(st.sampled_from(WAYS))
    absent = () if way != "load_model" or build_bridge_from_module else ("gemma2",)
    family = draw(st.sampled_from([family for family in families if family not in absent]))
    plain = draw(st.integers(0, 3))
    around = [n for n, a in AROUND.items() if way in a.ways and family in a.families]
    sound = [n for n, p in PROMPTS.items() if not p.wrong]
    tokenizer = draw(st.sampled_from(TOKENIZERS)) if way != "load_model" else "BOS"
    if tokenizer == "none" and draw(st.booleans()):
        sound = [n for n in sound if not PROMPTS[n].text]
    prompt = draw(st.sampled_from(list(PROMPTS) if draw(st.integers(0, 3)) == 0 else sound))
    one = PROMPTS[prompt].rows == "one" and not PROMPTS[prompt].text
    flags = [name for name in FLAGS if one or name not in _PER_TOKEN]
    return Situation(
        family,
        draw(st.sampled_from(DTYPES)),
        way,
        prompt,
        tokenizer,
        "nothing" if plain in (1, 3) else draw(st.sampled_from(flags)),
        "nothing" if plain in (2, 3) else draw(st.sampled_from(around)),
        draw(st.sampled_from(QUESTIONS)),
        draw(st.integers(0, 99)),
    )


# --- What is wrong with a situation ---------------------------------------------------------------


def objections(s: Situation) -> dict[str, bool]:
    """Words that a refusal of the situation may use, and whether it must be refused for them."""
    prompt, flag, around = PROMPTS[s.prompt], FLAGS[s.flag], AROUND[s.around]
    found = {part.may: False for part in (prompt, flag, around)}
    found |= {part.wrong: True for part in (prompt, flag, around)}
    if prompt.text and s.tokenizer == "none":
        found["tokenizer"] = True
    if s.prompt == "too long":
        found["context|n_ctx|positions"] = not s.is_bridge or s.family == "gpt2"
    if s.flag in _HF_ONLY and not s.is_bridge:
        found[s.flag] = True
    if s.flag == "padding_side=middle" and not prompt.text:
        found["padding_side"] = False
    if s.flag == "noise_floor" and s.dtype not in HALF:
        found["noise_floor"] = True
    if s.flag == "recomputed":
        found["recomputed"] = False
    if "prepend_bos" in s.flag and s.tokenizer == "no BOS" and prompt.text:
        found["BOS|prepend_bos"] = False
    if s.way in _HOOKED_WAYS and s.tokenizer == "in memory" and prompt.text:
        found["set_tokenizer"] = False
    if s.around == "train mode" and s.family == "gpt2" and s.is_bridge:
        found["training mode"] = True
    if s.dtype == torch.float64 and prompt.rows == "ragged" and s.is_bridge:
        # Hugging Face takes softmaxes in float32, where float64's lowest number is -inf: NaN.
        found["finite"] = False
    found.pop("", None)
    return found


# --- Tokenizers and models ------------------------------------------------------------------------


@cache
def tokenizer(name: str) -> Any:
    """A tokenizer of words w4 … w47, with the ids 4 … 47."""
    if name == "none":
        return None
    names = ["<unk>", "<pad>", "<s>", "</s>", *(f"w{i}" for i in range(4, 48))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    if name == "pad = BOS":
        special["pad_token"] = "<s>"
    if name != "no BOS":
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 2)]
        )
        special["bos_token"] = "<s>"
    found = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    if name == "in memory":
        return found
    found.save_pretrained(folder := _folder(name))
    found = AutoTokenizer.from_pretrained(folder)
    if name == "added token":
        found.add_tokens(["w48"])
    return found


_FOLDERS = tempfile.TemporaryDirectory(prefix="situations-")


def _folder(name: str) -> str:
    return str(Path(_FOLDERS.name, name.replace(" ", "-")))


@cache
def saved(family: str) -> str:
    """A folder with a model and a tokenizer, as save_pretrained writes them."""
    with quiet():
        build_hf(*BRIDGE[family], torch.float32).save_pretrained(_folder(family))
        tokenizer("BOS").save_pretrained(_folder(family))
    return _folder(family)


def build(family: str, dtype: torch.dtype, way: str) -> Any:
    """A model as the user has it before the first call."""
    with quiet():
        if way in _HF_WAYS:
            return build_hf(*BRIDGE[family], dtype)
        if way in _HOOKED_WAYS:
            return build_hooked(HOOKED[family], dtype)
        return tensorlens_tl.load_model(saved(family), dtype=dtype)


@cache
def twin(family: str, dtype: torch.dtype, way: str) -> Any:
    """The plain model: the same weights in a model that the library never meets."""
    if way in _LOAD_WAYS:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(
                saved(family), dtype=dtype, attn_implementation="eager"
            ).eval()
    return build(family, dtype, way)


shared = cache(build)


# --- Stand-ins for what other libraries put into a model ------------------------------------------


class Linear4bit(nn.Linear):
    """A layer whose weight is packed, as quantized layers are."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.whole, self.bias = [layer.weight], layer.bias
        packed = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.whole[0], self.bias)


class LoraLinear(nn.Module):
    """A layer with a low-rank adapter beside it."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer, like = base_layer, base_layer.weight
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        draw = torch.Generator().manual_seed(0)
        for name, size in (("lora_A", self.in_features), ("lora_B", self.out_features)):
            part = 0.3 * torch.randn(2, size, generator=draw).to(like)
            setattr(self, name, nn.ParameterDict({"default": nn.Parameter(part)}))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.lora_A["default"].T @ self.lora_B["default"]


def layer_0(hf: nn.Module) -> nn.Module:
    """The first decoder layer of a Hugging Face model."""
    return next(m for m in hf.modules() if isinstance(m, nn.ModuleList))[0]


def change(s: Situation, model: Any) -> None:
    """Make of a fresh model what the surroundings say, before the library meets it."""
    name, block = s.around, layer_0(model) if s.is_hf else model.blocks[0]
    parts = dict(block.named_modules())
    if name == "a quantized layer":
        path, layer = [item for item in parts.items() if isinstance(item[1], nn.Linear)][-1]
        block.set_submodule(path, Linear4bit(layer))
    elif name.startswith("an adapter at"):
        path = f"self_attn.{name[-1]}_proj"
        block.set_submodule(path, LoraLinear(parts[path]))
    elif name == "weights on meta":
        for part in block.modules():
            for key, weight in part.named_parameters(recurse=False):
                setattr(part, key, nn.Parameter(weight.to("meta"), requires_grad=False))
    elif name == "a NaN weight":
        matrix = next(p for p in reversed(list(block.parameters())) if p.ndim > 1)
        matrix.data[0, 0] = float("nan")


def write(s: Situation, model: Any, logits: Tensor) -> None:
    """Write to weights or logits after the capture, as the surroundings say."""
    block = layer_0(model) if s.is_hf else model.blocks[0]
    with torch.no_grad():
        for weight in block.parameters():
            if s.around == "weights written to":
                weight.mul_(1.5)
            elif s.around == "weights written to by .data":
                weight.data.mul_(1.5)
    if s.around == "weights converted":
        model.to(torch.float32 if s.dtype != torch.float32 else torch.float64)
    if s.around == "logits written to":
        logits.detach().add_(1)


# --- One situation played -------------------------------------------------------------------------


class FaultError(AssertionError):
    """What came is neither exact nor a refusal that the situation deserves."""


def rows_of(s: Situation) -> list[list[int]]:
    """The ids of one to three prompts of one to seven words, as long as the kind of input asks."""
    if s.prompt == "too long":
        return [[5] * (N_CTX + 1)]
    draw = np.random.default_rng(s.seed)
    kind, top = PROMPTS[s.prompt].rows, 49 if s.tokenizer == "added token" else 48
    n = 1 if kind == "one" else int(draw.integers(1, 4))
    sizes = draw.integers(1, 8, n)
    if kind == "equal":
        sizes[:] = sizes[0]
    return [draw.integers(4, top, size).tolist() for size in sizes]


def meant(s: Situation, host: Any, rows: list[list[int]]) -> list[list[list[int]]]:
    """The ids that the user means by each prompt: all readings that are right."""
    if not PROMPTS[s.prompt].text:
        return [[row] for row in rows]
    asked = FLAGS[s.flag].give.get("prepend_bos")
    if not s.is_hf:  # a host's own reading of text
        keys = {} if asked is None else {"prepend_bos": asked}
        return [[host.to_tokens(text, **keys)[0].tolist()] for text in words(rows)]
    own = tokenizer(s.tokenizer)
    bos = own.eos_token_id if own.bos_token_id is None else own.bos_token_id
    plain = [own(text, add_special_tokens=False)["input_ids"] for text in words(rows)]
    if asked is not None:
        return [[[bos, *row] if asked else row] for row in plain]
    right = [[own(text)["input_ids"]] for text in words(rows)]
    if host in TOLD:  # the other convention, of which the library told
        right = [[*ids, row, [bos, *row]] for ids, row in zip(right, plain, strict=True)]
    return right


TOLD: WeakSet[Any] = WeakSet()
"""Models of which the library told that its tokens of a text are not the tokenizer's own."""


def plain_logits(model: Any, rows: list[list[int]], edit: bool, **kwargs: Any) -> list[Tensor]:
    """The plain model's logits [pos, d_vocab] of each prompt alone, perhaps with block 0 edited."""
    block = model.blocks[0] if hasattr(model, "blocks") else layer_0(model)
    handle = block.register_forward_hook(_edit_output) if edit else None
    try:
        with quiet(), torch.no_grad():
            found = [model(torch.tensor([row]), **kwargs) for row in rows]
    finally:
        if handle is not None:
            handle.remove()
    return [getattr(out, "logits", out)[0] for out in found]


def _edited(x: Tensor) -> Tensor:
    step = torch.zeros_like(x)
    step[..., 0] = 1
    return x + step


def _edit_output(module: Any, args: Any, output: Any) -> Any:
    return (_edited(output[0]), *output[1:]) if isinstance(output, tuple) else _edited(output)


def state(model: Any) -> dict[str, Any]:
    """What the library must leave as it was."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "weights": [
            (id(p), p.data_ptr(), 0 if p.is_inference() else p._version, p.requires_grad)
            for p in model.parameters()
        ],
        "modes": model.training,
        "hooks": sum(len(getattr(m, name)) for m in model.modules() for name in hooks),
        "settings": repr(getattr(model, "cfg", None)),
    }


@contextlib.contextmanager
def surroundings(s: Situation, model: Any) -> Iterator[None]:
    """The modes and hooks of the situation."""
    training, name = model.training, s.around
    default = torch.get_default_dtype()
    asked = [p for p in model.parameters() if p.requires_grad]
    with contextlib.ExitStack() as stack:
        if name == "no_grad":
            stack.enter_context(torch.no_grad())
        elif name.startswith("inference_mode"):
            stack.enter_context(torch.inference_mode())
        elif name == "autocast":
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        elif name.startswith("a torch hook"):
            looks = name.endswith("looks")
            hook = (lambda *args: None) if looks else _edit_output
            stack.callback(layer_0(model).register_forward_hook(hook).remove)
        elif name.startswith("a hook"):
            looks = name.endswith("looks")
            host = tensorlens_tl.wrap(model) if s.is_hf else model
            act = (lambda t, hook: None) if looks else (lambda t, hook: _edited(t))
            stack.enter_context(host.hooks(fwd_hooks=[("blocks.0.hook_resid_post", act)]))
        try:
            if name == "train mode":
                model.train()
            elif name == "frozen weights":
                model.requires_grad_(False)
            elif name == "float64 by default":
                torch.set_default_dtype(torch.float64)
            elif name == "a device map":
                model.hf_device_map = {"": "cpu"}
            yield
        finally:
            model.train(training)
            torch.set_default_dtype(default)
            for p in asked:
                p.requires_grad_(True)


def call(s: Situation, model: Any, given: Any, kwargs: dict[str, Any], name: str) -> Any:
    """The user's one call."""
    own = tokenizer(name)
    if s.way == "hf":
        return tensorlens_tl.capture(model, given, **({"tokenizer": own} if own else {}), **kwargs)
    if s.is_hf:
        if s.way == "wrapped twice":
            tensorlens_tl.wrap(model)
        model = tensorlens_tl.wrap(model, own)
    if s.way.endswith("method"):
        return model.run_with_tensorlens(given, **kwargs)
    return tensorlens_tl.capture(model, given, **kwargs)


def give_tokenizer(s: Situation, model: Any, name: str) -> None:
    """Give a model the tokenizer of the situation, where the call does not; take off an older."""
    if s.way in _HOOKED_WAYS:
        if name in ("none", "in memory"):
            model.tokenizer = tokenizer(name)
        else:
            with quiet():
                model.set_tokenizer(tokenizer(name))
    elif s.is_hf and name == "none" and not AROUND[s.around].fresh:
        tensorlens_tl.wrap(model).tokenizer = None


def play(s: Situation) -> str:
    """Play one situation.

    Returns:
        "equal", or the words for which the library refused.

    Raises:
        FaultError: If what came is neither exact nor a refusal that the situation deserves.
    """
    against, around = objections(s), AROUND[s.around]
    model = (build if around.fresh else shared)(s.family, s.dtype, _kind(s))
    give_tokenizer(s, model, s.tokenizer)
    if around.fresh:
        with quiet(), torch.no_grad():
            change(s, model)
    if s.around == "a deep copy of the model":
        model = copy.deepcopy(model)
    runs = not (around.broken or s.around == "a quantized layer")
    keys = {} if s.is_hf else {"return_type": "logits"}
    if runs:
        plain_logits(model, [[5, 6]], False, **keys)  # a Bridge sets up hooks of its own then
    before, kinds = state(model), [type(m) for m in model.modules()]
    try:
        outcome = _exact(s, model)
    except ValueError as error:
        outcome = _deserved(error, against)
        if s.around in ("a quantized layer", "an adapter at v", "weights on meta") and s.is_hf:
            _must([type(m) for m in model.modules()] == kinds, "a refused model stays wrapped")
    else:
        wrong = [words for words, must in against.items() if must]
        _must(not wrong, f"served, though it should be refused for {wrong}")
    if runs:
        after = state(model)
        first = len(kinds) != len(list(model.modules()))  # wrapped in between
        changed = [k for k in before if before[k] != after[k] and not (first and k in _OF_MODULES)]
        _must(not changed, f"the model is left with other {changed}")
        row = [[5, 6, 7]]
        theirs = _reference(s, row, False)
        ours = plain_logits(model, row, False, **keys)
        _close(ours[0], theirs[0], _tolerance(s), "the model's logits afterwards")
    return outcome


_OF_MODULES = ("hooks", "settings", "weights")


def _kind(s: Situation) -> str:
    """One model serves all ways that begin with such a model."""
    return "hf" if s.is_hf else "hooked" if s.way in _HOOKED_WAYS else s.way


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise FaultError(what)


def _deserved(error: ValueError, against: dict[str, bool]) -> str:
    trace, message = error.__traceback__, str(error)
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = Path(trace.tb_frame.f_code.co_filename) if trace else Path()
    _must("tensorlens_tl" in raised_in.parts, f"raised in {raised_in.name}: {message}")
    _must(re.search(r"\. .*\.$", message, re.DOTALL) is not None, f"not two sentences: {message}")
    named = [words for words in against if re.search(words, message)]
    _must(bool(named), f"refused, where {list(against) or 'nothing'} is wrong: {message}")
    return named[0]


def _tolerance(s: Situation) -> float:
    """The tolerance of the narrowest dtype in which something is computed."""
    dtypes = {s.dtype, FLAGS[s.flag].give.get("dtype") or s.dtype} & set(TOLERANCE)
    if s.family != "gpt2" and "hooked" not in s.way:  # norms or softmaxes in float32
        dtypes |= {torch.float32}
    return max(TOLERANCE[dtype] for dtype in dtypes)


def _close(ours: Any, theirs: Any, tol: float, what: str, scale: float = 0.0) -> None:
    ours = torch.as_tensor(ours, dtype=torch.float64)
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    _must(ours.shape == theirs.shape, f"{what}: shape {[*ours.shape]}, not {[*theirs.shape]}")
    size = max(scale, float(theirs.abs().max()), 1e-9)
    off = float((ours - theirs).abs().max()) / size
    _must(off <= tol, f"{what} off by {off:.1e} (relative)")


def _reference(s: Situation, rows: list[list[int]], edit: bool) -> list[Tensor]:
    kind = _kind(s)
    model = twin(s.family, s.dtype, kind)
    if s.around.startswith("an adapter"):
        change(s, model := copy.deepcopy(model))
    return plain_logits(
        model, rows, edit, **({} if kind != "hooked" else {"return_type": "logits"})
    )


def _exact(s: Situation, model: Any) -> str:
    """Call the library and compare all it says with the plain model."""
    rows, prompt, flag = rows_of(s), PROMPTS[s.prompt], dict(FLAGS[s.flag].give)
    if s.flag in _PER_TOKEN:
        ids = prompt.make(rows)[0]
        width = len(ids) if prompt.rows == "one" and np.ndim(ids) == 1 else np.shape(ids)[-1]
        flag = {s.flag: torch.arange(width)[None]}

    def run(kept: list[Any]) -> None:
        given, kwargs = prompt.make(rows)
        try:
            kept.append(call(s, model, given, {**kwargs, **flag}, s.tokenizer))
        except BaseException as error:
            kept.append(error)

    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        told = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")

        def note() -> None:
            if any("the tokenizer itself" in str(warning.message) for warning in told):
                TOLD.add(model)

        stack.callback(note)
        if s.around == "another tokenizer first" and s.tokenizer != "none":
            give_tokenizer(s, model, "pad = BOS")
            call(s, model, "w9 w8", {}, "pad = BOS")
            give_tokenizer(s, model, s.tokenizer)
        if s.around == "another prompt first":
            call(s, model, [[9, 8, 7]], {}, s.tokenizer)
        modes = stack.enter_context(contextlib.ExitStack())
        modes.enter_context(surroundings(s, model))
        found: list[Any] = []
        if s.around == "two threads":
            threads = [threading.Thread(target=run, args=(found,)) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            run(found)
        note()
        for result in found:
            if isinstance(result, BaseException):
                raise result
        if "hook" in s.around or s.around.endswith("asked outside"):
            modes.close()
        for logits, lens in found:
            write(s, model, logits)
            if s.around == "a deep copy of the lens":
                lens = copy.deepcopy(lens)
            elif s.around == "a pickled lens":
                lens = pickle.loads(pickle.dumps(lens))
            _right(s, model, rows, logits, lens)
    return "equal"


def _right(s: Situation, model: Any, rows: list[list[int]], logits: Tensor, lens: Any) -> None:
    readings, spans = meant(s, model, rows), lens.capture.frame.spans
    tol, ids = _tolerance(s), lens.capture.prompts.tokens.tolist()
    if len(lens) != len(rows):
        raise FaultError(f"{len(lens)} prompts, not {len(rows)}")
    ran = [row[start:stop] for row, (start, stop) in zip(ids, spans, strict=True)]
    for row, right in zip(ran, readings, strict=True):
        _must(row in right, f"the tokens {row} were run; meant were {right}")
    theirs = _reference(s, ran, "edits" in s.around)
    if "written" not in s.around and "converted" not in s.around:
        for i, (start, stop) in enumerate(spans):
            _close(logits[i, start:stop], theirs[i], tol, "logits")
    answer(s, model, lens, theirs, tol)


def answer(s: Situation, model: Any, lens: Any, theirs: list[Tensor], tol: float) -> None:
    """Ask the lens one question, and compare the answer's sum with the plain model's logit."""
    pos = -1 if s.seed % 3 else 0
    target: Any = 7 if s.tokenizer == "none" or s.seed % 2 else "w7"
    logit = [float(row[pos, 7]) for row in theirs]
    scale = max(float(row.abs().max()) for row in theirs)

    def compare(values: Tensor, wanted: list[float]) -> None:
        size = max(scale, float(values.abs().sum(-1).max()))
        _close(values.sum(-1), wanted, tol, s.question, size)

    if s.question == "save and load":
        with tempfile.TemporaryDirectory() as folder:
            lens.save(Path(folder, "lens"))
            host = tensorlens_tl.wrap(model) if s.is_hf else model
            lens = tensorlens_tl.load(Path(folder, "lens"), model=host)
            compare(lens.attribute(7, pos=pos).values, logit)
    elif s.question == "edge":
        into = lens.attribute(target, pos=pos, by="edge").select(dest="logits")
        compare(into.values, logit)
    elif s.question == "token_scores":
        scores, bias = lens.token_scores("in_out", target, pos=pos), lens.operator.bias
        constant = lens.readout(bias)
        for i, (start, stop) in enumerate(lens.capture.frame.spans):
            at = stop - 1 if pos else start
            compare(torch.stack([*scores[i].double(), constant[i, at, 7].double()]), logit[i])
    elif s.question == "operator row":
        for i, one in enumerate(lens):
            T, x, n = one.operator, one.embedding, one.embedding.shape[1]
            row = sum(T.block(pos % n, j)[0] @ x[0, j] for j in range(n)) + T.bias[0, pos]
            y = torch.zeros_like(x)
            y[0, pos] = row
            _close(one.readout(y)[0, pos], theirs[i][pos], tol, s.question, scale)
    elif s.question == "one prompt":
        compare(lens[-1].attribute(target, pos=pos).values, logit[-1:])
    elif s.question == "many":
        for found, at in zip(lens.attribute_many([7, 7], [pos, 0]), (pos, 0), strict=True):
            compare(found.values, [float(row[at, 7]) for row in theirs])
    elif s.question == "versus":
        found = lens.attribute(target, versus=9, pos=pos)
        compare(found.values, [float(row[pos, 7] - row[pos, 9]) for row in theirs])
    elif s.question == "logits":
        ours = lens.readout(lens.operator.apply(lens.embedding) + lens.operator.bias)
        for i, (start, stop) in enumerate(lens.capture.frame.spans):
            _close(ours[i, start:stop], theirs[i], tol, s.question)
    else:
        compare(lens.attribute(target, pos=pos, by=s.question).values, logit)
