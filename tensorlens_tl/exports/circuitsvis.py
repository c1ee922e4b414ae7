"""The arguments of CircuitsVis's functions, made from a run.

function                  arrays
attention_heads           attention [head, query_pos, key_pos], tokens
attention_patterns        the same
attention_pattern         attention [query_pos, key_pos], tokens
colored_tokens            values [pos]: each token's share of the target
colored_tokens_multi      values [pos, head]: the total effect of each head at each position
token_log_probs           token_indices [pos], log_probs [pos, d_vocab], to_string
text_neuron_activations   activations [pos, layer, neuron] of the MLPs
topk_tokens               the same as [layer, pos, neuron], one array per prompt
topk_samples              the total effects of heads, nested [layer, head, prompt, pos]
visualize_model_performance   tokens [pos], str_tokens, logits [pos, d_vocab]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..attribution import Attribution, TargetGradient, attribute
from ..checks import token_text, whole
from ..operator import Capture, FrozenTransformer

ONE_HEAD = "attention_pattern"
PATTERNS = ("attention_heads", "attention_patterns", ONE_HEAD)
SEVERAL = ("topk_tokens", "topk_samples")
"""Functions that show several prompts. All others show one."""
FUNCTIONS = (
    *PATTERNS,
    "colored_tokens",
    "colored_tokens_multi",
    "token_log_probs",
    "text_neuron_activations",
    *SEVERAL,
    "visualize_model_performance",
)


def circuitsvis_arguments(
    function: str,
    capture: Capture,
    operator: FrozenTransformer,
    gradient: Callable[[], TargetGradient],
    layer: int | None = None,
    head: int | None = None,
) -> dict[str, Any]:
    """Make the arguments of a function of CircuitsVis.

    Args:
        function: The function's name, one of :data:`FUNCTIONS`.
        capture: The captured run.
        operator: The operator of that run.
        gradient: Gives the target, where the function shows shares of one.
        layer: Number of the block whose patterns are shown; None is all blocks.
        head: Number of the head of ``attention_pattern``.

    Returns:
        The arguments by name.

    Raises:
        ValueError: If there is no such function, block or head, there are several prompts, or the
            run lacks what is shown.
    """
    if function not in FUNCTIONS:
        raise ValueError(f"There is no function {function!r}. Use one of {', '.join(FUNCTIONS)}.")
    if function not in SEVERAL and capture.frame.batch != 1:
        raise ValueError(
            f"{function} shows one prompt, but the lens has {capture.frame.batch}. Take one with "
            "lens[i]."
        )
    if (layer is not None and function not in PATTERNS) or (
        head is not None and function != ONE_HEAD
    ):
        name = "layer=" if function not in PATTERNS else "head="
        raise ValueError(f"{function} takes no {name} here. Drop {name}.")
    start, stop = capture.frame.spans[0]
    tokens = list(capture.prompts.strings[0])
    if function in PATTERNS:
        return _attention(function, capture, layer, head, tokens)
    if function == "colored_tokens":
        rows = attribute(gradient(), "token")
        return {"tokens": tokens, "values": _by_position(rows, start, stop)}
    if function == "colored_tokens_multi":
        effects = _head_effects(capture, gradient(), 0)
        names = [str(node) for block in capture.blocks for node in block.attn.nodes()]
        values = torch.cat([own.T for own in effects], 1)
        return {"tokens": tokens, "values": values, "labels": names}
    if function == "topk_samples":
        goal, prompts = gradient(), range(capture.frame.batch)
        found = [_head_effects(capture, goal, i) for i in prompts]
        layers = range(len(capture.blocks))
        heads = [range(len(block.attn.nodes())) for block in capture.blocks]
        strings = [list(own) for own in capture.prompts.strings]
        return {
            "tokens": [[strings for _ in heads[n]] for n in layers],
            "activations": [
                [[found[i][n][h].tolist() for i in prompts] for h in heads[n]] for n in layers
            ],
            "first_dimension_name": "Head",
        }
    if function in ("text_neuron_activations", "topk_tokens"):
        every = _neurons(function, operator)
        arrays = [every[:, i, a:b] for i, (a, b) in enumerate(capture.frame.spans)]
        if function == "text_neuron_activations":
            return {"tokens": tokens, "activations": arrays[0].transpose(0, 1)}
        strings = [list(own) for own in capture.prompts.strings]
        return {"tokens": strings, "activations": [array.numpy() for array in arrays]}
    ids = capture.prompts.ids(function)[0, start:stop].cpu()
    if capture.logits.ndim != 3:
        raise ValueError(f"{function} needs logits at every position. Capture a language model.")
    logits = capture.logits[0, start:stop].detach().float().cpu()
    if function == "visualize_model_performance":
        return {"tokens": ids, "str_tokens": tokens, "logits": logits}
    return {
        "token_indices": ids,
        "log_probs": logits.log_softmax(-1),
        "to_string": lambda token: token_text(capture.tokenizer, int(token)),
    }


def _attention(
    function: str, capture: Capture, layer: int | None, head: int | None, tokens: list[str]
) -> dict[str, Any]:
    start, stop = capture.frame.spans[0]
    if function == ONE_HEAD and (layer is None or head is None):
        raise ValueError(f"{function} shows one head. Pass layer= and head=.")
    blocks = capture.blocks
    if layer is not None:
        n = whole(layer, "layer")
        if not -len(blocks) <= n < len(blocks):
            raise ValueError(
                f"layer={layer} does not exist. Pass a block from 0 to {len(blocks) - 1}."
            )
        blocks = (blocks[n],)
    patterns = [block.attn.pattern[0, :, start:stop, start:stop] for block in blocks]
    found, nodes = torch.cat(patterns), [n for block in blocks for n in block.attn.nodes()]
    found = found.detach().float().cpu()
    causal = not bool(found.triu(1).any())
    if function == "attention_patterns":
        return {"tokens": tokens, "attention": found}
    about = {"tokens": tokens, "min_value": 0.0, "max_value": 1.0, "mask_upper_tri": causal}
    if function == ONE_HEAD:
        if not 0 <= (h := whole(head, "head")) < len(found):
            raise ValueError(f"head={head} does not exist. Pass a head from 0 to {len(found) - 1}.")
        return about | {"attention": found[h]}
    return about | {"attention": found, "attention_head_names": list(map(str, nodes))}


def _by_position(rows: Attribution, start: int, stop: int) -> Float[Tensor, " pos"]:
    """The rows of one prompt summed by position; rows that have none are left out."""
    found = rows.values.new_zeros(stop - start)
    for source, value in zip(rows.sources, rows.values[0], strict=True):
        if source.pos is not None and start <= source.pos < stop:
            found[source.pos - start] += value
    return found.float().cpu()


def _head_effects(
    capture: Capture, goal: TargetGradient, prompt: int
) -> list[Float[Tensor, "head pos"]]:
    """The total effect of every head at every position of a prompt, one array per block."""
    start, stop = capture.frame.spans[prompt]
    rows = attribute(goal, "head", "total")
    found = [torch.zeros(len(block.attn.nodes()), stop - start) for block in capture.blocks]
    for source, value in zip(rows.sources, rows.values[prompt].tolist(), strict=True):
        node, pos = source.node, source.pos
        if node.kind == "head" and pos is not None and start <= pos < stop:  # type: ignore
            found[node.layer][node.index, pos - start] = value  # type: ignore
    return found


def _neurons(function: str, operator: FrozenTransformer) -> Float[Tensor, "layer batch pos neuron"]:
    """What the neurons of all MLPs had in the run."""
    found = [
        branch.body.hidden_in_run(branch.read(step.state))
        for step in operator.steps
        for branch in step.branches
        if branch.body.nodes()[0].kind == "mlp"
    ]
    if len(found) != operator.steps[-1].layer + 1 or len({own.shape for own in found}) > 1:
        raise ValueError(
            f"{function} shows one MLP per block, all of one width, and this model has others. Use "
            "'colored_tokens_multi', which shows heads."
        )
    return torch.stack(found).detach().float().cpu()
