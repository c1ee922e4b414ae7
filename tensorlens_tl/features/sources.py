"""Read a dictionary of features: a folder, an SAELens SAE, a state dict, a transcoder set.

Files are safetensors with JSON or a flat YAML beside them. Nothing in them is executed, and neither
SAELens nor circuit-tracer is imported: their objects are read by the names of their parts.

1. Find the configuration and the weights of the source.
2. Turn the weights to one layout, W_enc [d_in, d_sae] and W_dec [d_sae, d_out].
3. Fold what can be folded: the decoder's norms, and the constant that activations were scaled by.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..checks import file_path, kind_of, spelled
from ..graph import layer_site, resid_site
from ..readers import MLP_OUT
from .dictionary import ACTIVATIONS, NORMS, FeatureDictionary

_PLAIN = {
    "standard": "relu",
    "topk": "topk",
    "abstopk": "abstopk",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "gated": "gated",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""The activation function of each architecture of SAELens that is a dictionary of features."""
_BATCHED = ("batchtopk", "matryoshka_batchtopk")
_SETS = {"jump_relu": "jumprelu", "relu": "relu", "topk": "topk"}
_RESID_MID = resid_site(0, "mid").partition("0.")[2]
_WEIGHTS = ("sae_weights.safetensors", "model.safetensors", "weights.safetensors")


@spelled
def load(
    source: Any,
    *,
    site: str | None = None,
    writes: str | None = None,
    scale: float | None = None,
    config: Mapping[str, Any] | None = None,
) -> FeatureDictionary | tuple[FeatureDictionary, ...]:
    """Read the features of a sparse autoencoder, of a transcoder, or of a set of transcoders.

    Served are standard, top-k, batch-top-k, JumpReLU and gated SAEs, and transcoders, with a skip
    connection or across layers.

    Args:
        source: A folder that SAELens or circuit-tracer wrote; an SAE of SAELens; a transcoder set
            or a cross-layer transcoder of circuit-tracer; or the weights by name, "W_enc"
            [d_in, d_sae], "b_enc" [d_sae], "W_dec" [d_sae, d_out] and "b_dec" [d_out], with
            "threshold", "r_mag", "b_mag", "b_gate" and "W_skip" where there are such.
        site: The hook point that is read, such as "blocks.2.hook_resid_pre". None takes what the
            source says. In a set, the part after the block's number: "ln2.hook_normalized".
        writes: The hook point that a transcoder writes to. None takes what the source says.
        scale: The constant that activations were multiplied by in training, for an SAE with
            ``normalize_activations="expected_average_only_in"``.
        config: More entries for the source's configuration: "architecture", "k", "model_name" and
            others, by SAELens's names.

    Returns:
        The dictionary; for a set one per layer, in order.

    Raises:
        ValueError: If the source is no dictionary, is damaged, or is of a kind that is not served.

    Example:
        >>> import torch
        >>> from tensorlens_tl import features
        >>> W = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
        >>> weights = {"W_enc": W, "W_dec": W.T, "b_enc": W[0] * 0, "b_dec": W[:, 0] * 0}
        >>> top = {"architecture": "topk", "k": 4}
        >>> sae = features.load(weights, site="blocks.1.hook_resid_pre", config=top)
        >>> int((sae.encode(torch.ones(3, 8)) > 0).sum(-1).max()) <= 4
        True
    """
    given = {"site": site, "writes": writes, "scale": scale, "config": dict(config or {})}
    for name, point in (("site", site), ("writes", writes)):
        if point is not None and not isinstance(point, str):
            raise ValueError(
                f"{name}={point!r} is no hook point. Pass its name, such as "
                f"{resid_site(2, 'pre')!r}."
            )
    if isinstance(source, Mapping):
        return _one(dict(source), {}, given)
    if isinstance(source, str | Path):
        return _from_folder(file_path(source, "source"), given)
    if hasattr(source, "transcoders"):
        weights = [_set_weights(one) for one in source.transcoders]
        return _layers(weights, _set_config(source), given)
    if hasattr(source, "_get_decoder_vectors") and hasattr(source, "n_layers"):
        return _layers(_cross_weights(source), _set_config(source), given)
    if not hasattr(source, "state_dict") or not hasattr(getattr(source, "cfg", None), "to_dict"):
        raise ValueError(
            f"source={kind_of(source)} is no dictionary of features. Pass a folder, an SAE of "
            "SAELens, or weights by name."
        )
    return _one(dict(source.state_dict()), source.cfg.to_dict(), given)


# --- Folders -------------------------------------------------------------------------------------


def _from_folder(
    folder: Path, given: dict[str, Any]
) -> FeatureDictionary | tuple[FeatureDictionary, ...]:
    try:
        cfg = _config(folder)
        layers = sorted(folder.glob("layer_*.safetensors"), key=_number)
        crossed = sorted(folder.glob("W_enc_*.safetensors"), key=_number)
        if layers:
            return _layers([_set_file(load_file(path)) for path in layers], cfg, given)
        if crossed:
            parts = [
                load_file(path) | load_file(folder / path.name.replace("W_enc_", "W_dec_"))
                for path in crossed
            ]
            cut = [{k.rpartition("_")[0]: t for k, t in part.items()} for part in parts]
            return _layers([_set_file(part) for part in cut], cfg, given)
        names = [name for name in _WEIGHTS if (folder / name).is_file()]
        weights = load_file(folder / names[0])
    except (OSError, SafetensorError, IndexError, json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(
            f"source={str(folder)!r} holds no whole dictionary of features. Pass a folder with "
            "cfg.json and sae_weights.safetensors, or with layer_0.safetensors and so on."
        ) from None
    return _one(weights, cfg, given)


def _config(folder: Path) -> dict[str, Any]:
    """The configuration beside the weights; of a set it is flat YAML, of which lines are read."""
    for name in ("cfg.json", "config.json"):
        if (path := folder / name).is_file():
            return dict(json.loads(path.read_text(encoding="utf-8")))
    if not (path := folder / "config.yaml").is_file():
        return {}
    lines = (line.partition(":") for line in path.read_text(encoding="utf-8").splitlines())
    found = {key.strip(): value.strip().strip("'\"") for key, colon, value in lines if colon}
    return {key: int(value) if value.isdecimal() else value for key, value in found.items()}


def _number(path: Path) -> int:
    number = path.stem.rpartition("_")[2]
    return int(number) if number.isdecimal() else -1


# --- Sets of transcoders -------------------------------------------------------------------------


def _set_config(source: Any) -> dict[str, Any]:
    names = ("feature_input_hook", "feature_output_hook", "activation_function")
    return {name: getattr(source, name) for name in names if hasattr(source, name)}


def _set_file(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one layer with SAELens's names and layout."""
    found = {name.rpartition(".")[2]: tensor for name, tensor in weights.items()}
    if "W_enc" in found:
        # circuit-tracer keeps encoders as [d_sae, d_in].
        found["W_enc"] = found["W_enc"].T
    return found


def _set_weights(one: Any) -> dict[str, Tensor]:
    """The weights of one transcoder of a set; encoders and decoders may be read late."""
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip")
    found = {name: getattr(one, name, None) for name in names}
    act = getattr(one, "activation_function", None)
    found |= {"threshold": getattr(act, "threshold", None)}
    if isinstance(k := getattr(act, "k", None), int):
        found["k"] = torch.tensor(k)
    return _set_file({name: t.detach() for name, t in found.items() if t is not None})


def _cross_weights(source: Any) -> list[dict[str, Tensor]]:
    """The weights of every layer of a cross-layer transcoder."""
    found = []
    threshold = getattr(source.activation_function, "threshold", None)
    for layer in range(source.n_layers):
        own = {
            "W_enc": source._get_encoder_weights(layer),
            "W_dec": source._get_decoder_vectors(layer),
            "b_enc": source.b_enc[layer],
            "b_dec": source.b_dec[layer],
        }
        if threshold is not None:
            own["threshold"] = threshold[layer].flatten()
        if getattr(source, "W_skip", None) is not None:
            own["W_skip"] = source.W_skip[layer].T
        found.append(_set_file({name: tensor.detach() for name, tensor in own.items()}))
    return found


def _layers(
    weights: list[dict[str, Tensor]], cfg: dict[str, Any], given: dict[str, Any]
) -> tuple[FeatureDictionary, ...]:
    """One transcoder per layer."""
    cfg = cfg | given["config"]
    reads = given["site"] or cfg.get("feature_input_hook") or _RESID_MID
    writes = given["writes"] or cfg.get("feature_output_hook") or MLP_OUT
    found = []
    for layer, own in enumerate(weights):
        act = "jumprelu" if "threshold" in own else str(cfg.get("activation", "relu"))
        k = int(own["k"]) if "k" in own else cfg.get("k")
        act = "topk" if "k" in own else act
        kind = {"architecture": "transcoder", "activation": _SETS.get(act, act), "k": k}
        places = {"site": layer_site(layer, reads), "writes": layer_site(layer, writes)}
        found.append(_one(own, cfg | kind, given | places | {"config": {}}))
    return tuple(found)


# --- One dictionary ------------------------------------------------------------------------------


def _one(weights: dict[str, Any], cfg: dict[str, Any], given: dict[str, Any]) -> FeatureDictionary:
    cfg = _flat(cfg) | given["config"]
    kind = str(cfg.get("architecture", "standard"))
    act = cfg.get("activation") or _activation(kind, cfg)
    if act not in ACTIVATIONS:
        raise ValueError(
            f"activation={act!r} is none that can be read. Use one of {', '.join(ACTIVATIONS)}."
        )
    weights = {name: _tensor(tensor, name) for name, tensor in weights.items()}
    site, writes = _sites(cfg, given, kind)
    # 1. The weights by name, and what is missing.
    if act == "gated":
        # A gated SAE has two biases; b_enc here is the one of the size.
        weights["b_enc"] = weights.get("b_mag", weights.get("b_gate", torch.zeros(0)))
    if act == "jumprelu" and "threshold" not in weights:
        _batch_threshold(weights, kind)
    names = ["W_enc", "b_enc", "W_dec", "b_dec"]
    names += {"gated": ["r_mag", "b_gate", "b_mag"], "jumprelu": ["threshold"]}.get(act, [])
    if absent := [name for name in names if name not in weights]:
        raise ValueError(
            f"The weights lack {', '.join(absent)}, which a {kind} dictionary has. Pass all of "
            f"{', '.join(names)}."
        )
    _check_shapes(weights, names)
    # 2. The decoder's norms, and the constant that activations were scaled by.
    if cfg.get("rescale_acts_by_decoder_norm"):
        # (‖d‖ a) (d / ‖d‖): the same reconstruction, but top-k then ranks by what features write.
        norms = weights["W_dec"].norm(dim=-1)
        weights["W_enc"] = weights["W_enc"] * norms
        weights["b_enc"] = weights["b_enc"] * norms
        weights["W_dec"] = weights["W_dec"] / norms[:, None]
    norm = _norm(weights, str(cfg.get("normalize_activations", "none")), given["scale"])
    k = cfg.get("k") if act in ("topk", "abstopk") else None
    if act in ("topk", "abstopk") and not k:
        raise ValueError(f"The {kind} dictionary does not say its k. Pass config={{'k': 32}}.")
    skip = weights.get("W_skip")
    return FeatureDictionary(
        architecture=kind,
        site=site,
        writes=writes,
        **{name: weights[name] for name in names[:4]},
        activation=act,
        k=None if k is None else int(k),
        threshold=weights["threshold"] if act == "jumprelu" else None,
        # Trained as a logarithm, so that the gain is positive.
        gain=weights["r_mag"].exp() if act == "gated" else None,
        b_gate=weights["b_gate"] if act == "gated" else None,
        centered=bool(cfg.get("apply_b_dec_to_input", True)) and writes == site,
        norm=norm,
        W_skip=None if skip is None else skip.T,
        model_name=str(cfg.get("model_name") or ""),
    )


def _flat(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the entries of its metadata beside the others."""
    inner = cfg.get("metadata")
    return dict(cfg) | (dict(inner) if isinstance(inner, Mapping) else {})


def _activation(kind: str, cfg: Mapping[str, Any]) -> str:
    if kind not in _PLAIN:
        raise ValueError(
            f"architecture={kind!r} is no dictionary that can be read. Use one of "
            f"{', '.join(_PLAIN)}."
        )
    old = cfg.get("activation_fn", cfg.get("activation_fn_str"))  # before SAELens 6
    return str(old) if kind == "standard" and old in ("tanh-relu", "topk") else _PLAIN[kind]


def _tensor(given: Any, name: str) -> Tensor:
    found = torch.as_tensor(given).detach()
    if found.is_floating_point() and not bool(found.isfinite().all()):
        raise ValueError(f"{name} holds nan or inf. Load the weights again.")
    # Exact: every number in half precision is one in float32.
    return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found


def _sites(cfg: Mapping[str, Any], given: dict[str, Any], kind: str) -> tuple[str, str]:
    site = given["site"] or cfg.get("hook_name")
    if not site:
        raise ValueError(
            "The source does not say which hook point it reads. Pass site=, such as "
            f"{resid_site(2, 'pre')!r}."
        )
    writes = given["writes"] or (cfg.get("hook_name_out") if "transcoder" in kind else None)
    if not writes and "transcoder" in kind:
        raise ValueError(
            "The transcoder does not say which hook point it writes to. Pass writes=, such as "
            f"{layer_site(2, MLP_OUT)!r}."
        )
    return str(site), str(writes or site)


def _batch_threshold(weights: dict[str, Tensor], kind: str) -> None:
    """Turn the threshold of a batch-top-k SAE, in units of output, into one per feature."""
    if kind in _BATCHED and "topk_threshold" not in weights:
        raise ValueError(
            f"The {kind} dictionary has no threshold, so what fires would depend on the batch. "
            "Save it with save_inference_model."
        )
    if kind in _BATCHED:
        # Trained on whole batches, such an SAE fires above one number once it is saved.
        weights["threshold"] = weights["topk_threshold"].expand_as(weights["b_enc"])


def _norm(weights: dict[str, Tensor], norm: str, scale: float | None) -> str:
    if norm == "expected_average_only_in":
        if not isinstance(scale, int | float) or not scale > 0:
            raise ValueError(
                f"scale={scale!r}, but activations were multiplied by a constant in training. "
                "Pass that constant, or save the SAE with save_inference_model."
            )
        # (s x − b) W = (x − b / s) (s W), and what comes out is divided by s: b_dec and W_dec are.
        weights["W_enc"] = weights["W_enc"] * scale
        weights["W_dec"], weights["b_dec"] = weights["W_dec"] / scale, weights["b_dec"] / scale
        return "none"
    if scale is not None:
        raise ValueError(f"scale={scale!r} belongs to no {norm!r} norm. Drop scale=.")
    if norm not in NORMS:
        raise ValueError(
            f"normalize_activations={norm!r} is not folded in. Fold it in SAELens, and save the "
            "SAE with save_inference_model."
        )
    return norm


def _check_shapes(weights: dict[str, Tensor], names: list[str]) -> None:
    d_sae = weights["W_enc"].shape[1] if weights["W_enc"].ndim == 2 else 0
    wide = weights["W_dec"]
    fits = d_sae > 0 and wide.ndim in (2, 3) and len(wide) == d_sae
    fits &= fits and weights["b_dec"].shape == wide.shape[-1:]
    biases = [weights[name] for name in names if name not in ("W_enc", "W_dec", "b_dec")]
    if not fits or any(bias.shape != (d_sae,) for bias in biases):
        shapes = ", ".join(f"{name} {list(weights[name].shape)}" for name in names)
        raise ValueError(
            f"The weights do not fit each other: {shapes}. Pass W_enc [d_in, d_sae], W_dec "
            "[d_sae, d_out], b_dec [d_out] and one bias per feature."
        )
