"""Attention patterns as the HeadVis page reads them: a folder of JSON files.

A head's patterns are kept sparse: the largest keys of each query. What the page plots of a head are
means over all prompts and positions, of the full patterns.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import at_least_one, file_path
from ..operator import Capture

METRICS = {
    "self_attention_score": "Mean attention of a token to itself",
    "prev_token_score": "Mean attention to the token before",
    "pattern_entropy": "Mean entropy of a query's pattern, in nats",
    "qk_distance": "Mean distance |q - k|, weighted by attention",
    "qk_distance_variance": "Variance of that distance",
    "induction_score": "Mean attention to what followed earlier occurrences of the query's token",
}
"""What is measured of each head. A score with no token to measure is null."""
TOP_TOKENS = 50


def save_headvis(
    capture: Capture,
    folder: str | os.PathLike[str],
    top_k: int = 8,
    least: float = 0.005,
    n_intervals: int = 5,
    dataset: str = "prompts",
) -> None:
    """Write the patterns of a batch of prompts as a HeadVis data folder, whole or not at all.

    Args:
        capture: The captured run.
        folder: The new folder.
        top_k: How many keys to keep for each query.
        least: Attention below this is not kept.
        n_intervals: Into how many groups the prompts of a head are put, by their largest attention.
        dataset: What the prompts are called.

    Raises:
        ValueError: If the folder exists or cannot be made, a number is wrong, the rows have no
            token ids, or a layer has no patterns.
    """
    top_k, n_intervals = at_least_one(top_k, "top_k"), at_least_one(n_intervals, "n_intervals")
    if isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least < 1:
        raise ValueError(f"least={least!r} is not a share of attention. Pass a number from 0 to 1.")
    place = Path(os.path.realpath(file_path(folder, "folder")))
    if place.exists() or not place.parent.is_dir():
        raise ValueError(
            f"folder={str(folder)!r} cannot be made. Pass a new folder in one that exists."
        )
    ids = capture.prompts.ids("save_headvis")
    own = [ids[i, start:stop] for i, (start, stop) in enumerate(capture.frame.spans)]
    unfinished = place.with_name(f".{place.name}.{secrets.token_hex(8)}.tmp")
    try:
        (unfinished / "heads").mkdir(parents=True)
        (unfinished / "attributions").mkdir()
        rows = []
        for layer, block in enumerate(capture.blocks):
            for head in range(len(block.attn.nodes())):
                patterns = _patterns(capture, block.attn.mix.head(head).pattern)
                rows.append({"layer": layer, "head": head, **_metrics(patterns, own)})
                entry = _head(capture, patterns, top_k, least, n_intervals)
                _write(unfinished / "heads" / f"L{layer}H{head}.json", entry)
        _write(unfinished / "scatter_data.json", rows)
        _write(unfinished / "server_config.json", {})
        _write(unfinished / "attributions" / "manifest.json", {})
        _write(unfinished / "config.json", _config(capture, rows, n_intervals, dataset))
        os.replace(unfinished, place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _patterns(
    capture: Capture, pattern: Float[Tensor, "batch 1 query_pos key_pos"]
) -> list[Float[Tensor, "query_pos key_pos"]]:
    """One head's pattern of every prompt, without padding."""
    spans = capture.frame.spans
    return [pattern[i, 0, a:b, a:b].double().cpu() for i, (a, b) in enumerate(spans)]


def _metrics(patterns: list[Tensor], ids: list[Tensor]) -> dict[str, float | None]:
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for A, tokens in zip(patterns, ids, strict=True):
        n = len(A)
        at = torch.arange(n)
        distance = (at[:, None] - at).abs().double()
        # Earlier occurrences of the query's token, each moved to the position after it.
        same = (tokens[:, None] == tokens).cpu() & (at[:, None] > at)
        after = torch.zeros_like(same)
        after[:, 1:] = same[:, :-1]
        parts = {
            "self_attention_score": (A.diagonal().sum(), n),
            "prev_token_score": (A.diagonal(-1).sum(), n - 1),
            "pattern_entropy": (torch.special.entr(A).sum(), n),
            "qk_distance": ((A * distance).sum(), float(A.sum())),
            "qk_distance_variance": ((A * distance**2).sum(), float(A.sum())),
            "induction_score": (A[after].sum(), int(same.any(1).sum())),
        }
        for name, (value, count) in parts.items():
            sums[name] += float(value)  # type: ignore
            counts[name] += count  # type: ignore
    found = {name: sums[name] / counts[name] if counts[name] else None for name in METRICS}
    mean, square = found["qk_distance"], found["qk_distance_variance"]
    if mean is not None and square is not None:
        found["qk_distance_variance"] = square - mean**2
    return {name: None if x is None else round(x, 6) for name, x in found.items()}


def _head(
    capture: Capture, patterns: list[Tensor], top_k: int, least: float, n_intervals: int
) -> dict[str, Any]:
    """The entry of one head: its patterns, and the tokens and distances they join."""
    # The page leaves out the first row and the first column where it looks for the largest.
    largest = [float(A[1:, 1:].max()) if len(A) > 1 else 0.0 for A in patterns]
    order = sorted(range(len(patterns)), key=lambda i: largest[i])
    rank = {i: n for n, i in enumerate(order)}
    sequences, distances = [], Counter()
    queries: Counter[str] = Counter()
    keys: Counter[str] = Counter()
    for i, A in enumerate(patterns):
        n, tokens = len(A), capture.prompts.strings[i]
        kept = A.topk(min(top_k, n), dim=1)
        cells = [
            (q, k, round(float(value), 4))
            for q in range(n)
            for k, value in sorted(zip(kept.indices[q].tolist(), kept.values[q], strict=True))
            if value > 0 and value >= least
        ]
        for q, k, value in cells:
            queries[tokens[q]] += value  # type: ignore
            keys[tokens[k]] += value  # type: ignore
            distances[abs(q - k)] += value  # type: ignore
        sequences.append(
            {
                "sequence_id": i,
                "interval": 1 + rank[i] * n_intervals // len(patterns),
                "tokens": list(tokens),
                "attention_indices": [q * n + k for q, k, _ in cells],
                "attention_values": [value for _, _, value in cells],
                "seq_len": n,
                "max_activation": round(largest[i], 4),
            }
        )
    edges = [0, 1]
    while edges[-1] < max(map(len, patterns)):
        edges.append(2 * edges[-1])
    bins = [
        round(sum(x for d, x in distances.items() if low <= d < high), 4)
        for low, high in pairwise(edges)
    ]
    heights = torch.histc(torch.tensor(largest), bins=10, min=0, max=1).int().tolist()
    return {
        "sequences": sequences,
        "qk_distance_histogram": {"bin_edges": edges, "bin_values": bins},
        "top_query_tokens": _ranked(queries),
        "top_key_tokens": _ranked(keys),
        "histogram": {"bin_edges": [i / 10 for i in range(11)], "bin_values": heights},
        "statistics": {
            "n_samples": len(patterns),
            "mean_max_activation": round(sum(largest) / len(largest), 4),
        },
    }


def _ranked(weights: Counter[str]) -> list[dict[str, Any]]:
    return [{"token": t, "weight": round(x, 4)} for t, x in weights.most_common(TOP_TOKENS)]


def _config(
    capture: Capture, rows: list[dict[str, Any]], n_intervals: int, dataset: str
) -> dict[str, Any]:
    lengths = [stop - start for start, stop in capture.frame.spans]
    return {
        "model_name": capture.model_name,
        "heads": [[row["layer"], row["head"]] for row in rows],
        "n_layers": len(capture.blocks),
        "n_heads": max(len(block.attn.nodes()) for block in capture.blocks),
        "n_intervals": n_intervals,
        "metrics": list(METRICS),
        "metric_descriptions": METRICS,
        "head_data_pattern": "L{layer}H{head}.json",
        "has_umap": False,
        "umap_heads": [],
        "custom_plots": [
            {"key": "qk_distance_histogram", "label": "Distance of query and key"},
            {"key": "histogram", "label": "Largest attention of a prompt"},
        ],
        "custom_tables": [
            {"key": "top_query_tokens", "label": "Query tokens"},
            {"key": "top_key_tokens", "label": "Key tokens"},
        ],
        "statistics_display": {
            "n_samples": {"label": "Prompts", "format": "default"},
            "mean_max_activation": {"label": "Mean largest attention", "format": "default"},
        },
        "pipeline_config": {
            "model_name": capture.model_name,
            "dataset_name": dataset,
            "n_sequences": len(lengths),
            "seq_len": max(lengths),
            "dtype": str(capture.logits.dtype).removeprefix("torch."),
            "attn_implementation": "eager",
        },
    }


def _write(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
