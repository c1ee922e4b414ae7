"""Earlier token-by-token maps, made of attention patterns alone.

Every function returns [batch, query_pos, key_pos], destination first; padding is 0. L is the number
of tokens. Maps of single layers are combined as attention rollout does: rows are normalized, then
the layers are multiplied, so that rows sum to one.
"""

from __future__ import annotations

import zlib
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import need, whole
from ..operator import Capture

Matrix = Float[Tensor, "batch query_pos key_pos"]

FLOW_UNIT = 2**52
"""Capacities are integers in units of 2⁻⁵², so that sums are exact and flow algorithms end."""


# --- Rows and layers -----------------------------------------------------------------------------


def identity(capture: Capture) -> Matrix:
    """The identity over each prompt's real tokens."""
    return torch.diag_embed(capture.frame.real.to(capture.frame.dtype))


def rows(capture: Capture, matrix: Matrix) -> Matrix:
    """Divide every row by its sum over real tokens; a row of zeros becomes the identity's."""
    real = capture.frame.real
    matrix = torch.where(real[:, :, None] & real[:, None, :], matrix, 0)
    total = matrix.sum(-1, keepdim=True)
    # The inner where keeps 0 / 0 out of what the outer one drops.
    return torch.where(total > 0, matrix / torch.where(total > 0, total, 1), identity(capture))


def product(capture: Capture, layers: list[Matrix]) -> Matrix:
    """Multiply the layers' matrices, the last layer leftmost."""
    # (A_L … A_1)[i, j] is what position i takes of token j through all layers.
    return reduce(lambda below, layer: layer @ below, layers, identity(capture))


def mean_patterns(capture: Capture) -> list[Matrix]:
    """Every layer's pattern, averaged over its heads."""
    real = capture.frame.real
    pairs = real[:, :, None] & real[:, None, :]
    return [torch.where(pairs, block.attn.pattern.mean(1), 0) for block in capture.blocks]


def halved(capture: Capture, matrix: Matrix) -> Matrix:
    """½ M + ½ I, rows normalized: the residual counted as half of what a token becomes."""
    return rows(capture, 0.5 * rows(capture, matrix) + 0.5 * identity(capture))


# --- Attention alone -----------------------------------------------------------------------------


def mean_attention(capture: Capture) -> Matrix:
    """Mean attention: the pattern A averaged over layers and heads.

    Cost: nothing beyond the capture.

    Args:
        capture: The captured run.

    Returns:
        The matrix. Its rows sum to one where the patterns' rows do.
    """
    return torch.stack(mean_patterns(capture)).mean(0)


def last_layer_attention(capture: Capture) -> Matrix:
    """Last-layer attention: the pattern A averaged over the last layer's heads.

    Cost: nothing beyond the capture.

    Args:
        capture: The captured run.

    Returns:
        The matrix. Its rows sum to one where the pattern's rows do.
    """
    return mean_patterns(capture)[-1]


def rollout(capture: Capture) -> Matrix:
    """Attention rollout (Abnar & Zuidema 2020): Π_l (½ mean_h A_l + ½ I), rows renormalized.

    Cost: L³ per layer.

    Args:
        capture: The captured run.

    Returns:
        The matrix; its rows sum to one.
    """
    return product(capture, [halved(capture, layer) for layer in mean_patterns(capture)])


def attention_flow(capture: Capture, query: Int[Tensor, " batch"] | None = None) -> Matrix:
    """Attention flow (Abnar & Zuidema 2020): the maximum flow from an output to an input token.

    The graph has a node per layer and token, and an edge (l + 1, i) → (l, j) of capacity
    (½ mean_h A_l + ½ I)[i, j]. Cost: one maximum flow per pair of tokens. That is L² / 2 for a
    causal matrix and L for one row (about 0.3 s for 32 tokens in 6 layers).

    Args:
        capture: The captured run.
        query: Position of the one row to compute, per prompt [batch]. None computes all rows.

    Returns:
        The flows, in units of one token's outgoing capacity. They are not normalized.

    Raises:
        ValueError: If networkx is missing.
    """
    networkx = need("networkx", "baselines", "attention_flow")
    algorithms = need("networkx.algorithms.flow", "baselines", "attention_flow")
    layers = [halved(capture, layer) for layer in mean_patterns(capture)]
    flows = torch.zeros_like(layers[0])
    for prompt, (start, stop) in enumerate(capture.frame.spans):
        graph = networkx.DiGraph()
        graph.add_nodes_from((level, i) for level in range(len(layers) + 1) for i in range(stop))
        for level, layer in enumerate(layers):
            capacities = layer[prompt].double().tolist()
            for i, j in layer[prompt].nonzero().tolist():
                capacity = round(capacities[i][j] * FLOW_UNIT)
                # Flow runs from the output down to the token, against the direction of the model.
                graph.add_edge((level + 1, i), (level, j), capacity=capacity)
        # One residual network serves every pair of ends.
        residual = algorithms.build_residual_network(graph, "capacity")
        wanted = range(start, stop) if query is None else [int(query[prompt])]
        for i in wanted:
            below = networkx.descendants(graph, (len(layers), i))
            for j in (j for level, j in below if level == 0):
                ends = (len(layers), i), (0, j)
                flow = networkx.maximum_flow_value(
                    graph, *ends, flow_func=algorithms.preflow_push, residual=residual
                )
                flows[prompt, i, j] = flow / FLOW_UNIT
    return flows


def random(capture: Capture, seed: int = 0) -> Matrix:
    """Random scores: uniform numbers wherever attention can carry a token. The floor of a table.

    Args:
        capture: The captured run.
        seed: Seed of the numbers. Seed and tokens together decide a prompt's numbers, whatever
            else is in the batch.

    Returns:
        Numbers in [0, 1); 0 where attention cannot carry the source to the destination.
    """
    whole(seed, "seed")
    numbers = torch.zeros_like(identity(capture))
    for prompt, (start, stop) in enumerate(capture.frame.spans):
        given = capture.prompts.given[prompt]
        given = given[start:stop] if capture.prompts.by_row else given
        ids = given.flatten().tolist()
        # crc32, not hash(): Python salts the latter, and every process would draw other numbers.
        generator = torch.Generator().manual_seed(zlib.crc32(repr((seed, ids)).encode()))
        drawn = torch.rand(
            stop - start, stop - start, generator=generator, device="cpu", dtype=torch.float64
        )
        numbers[prompt, start:stop, start:stop] = drawn.to(numbers)
    return torch.where(rollout(capture) > 0, numbers, 0)
