"""Train a top-k SAE or a transcoder, and measure it: python benchmarks/features.py --out FOLDER.

1. Run the model on prompts, or on the lines of --text, and keep what stands at the site; for a
   transcoder also what the MLP of that block adds.
2. Train a top-k dictionary on it with Adam, and save it as SAELens does.
3. Split the targets of 20 prompts a task by feature: how far the sum is off, what features, the
   error and constants carry, and the processor time beyond the sweep.

With --cost nothing is trained: a random model of GPT-2's shape is split by 16 d random features.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import tensorlens_tl
from tensorlens_tl import demo, features


def activations(model: Any, texts: list[str], points: list[str]) -> list[Tensor]:
    """What stands at hook points at every token of some texts [row, d]."""
    found: list[list[Tensor]] = [[] for _ in points]
    for text in texts:
        with torch.no_grad():
            _, cache = model.run_with_cache(text, names_filter=points)
        for rows, point in zip(found, points, strict=True):
            rows.append(cache[point][0].float())
    return [torch.cat(rows) for rows in found]


def train(x: Tensor, y: Tensor, d_sae: int, k: int, steps: int, seed: int = 0) -> dict[str, Tensor]:
    """Train y ≈ z W_dec + b_dec, z the k largest of (x − b_in) W_enc + b_enc."""
    torch.manual_seed(seed)
    same = y is x
    W = torch.nn.functional.normalize(torch.randn(d_sae, y.shape[1]), dim=-1)
    W_enc = W.T.clone() if same else torch.randn(x.shape[1], d_sae) / x.shape[1] ** 0.5
    parts = {"W_enc": W_enc, "b_enc": torch.zeros(d_sae), "W_dec": W, "b_dec": y.mean(0)}
    parts = {name: part.requires_grad_() for name, part in parts.items()}
    optimizer = torch.optim.Adam(parts.values(), lr=3e-3)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (512,))
        inside = x[rows] - parts["b_dec"] if same else x[rows]
        a = inside @ parts["W_enc"] + parts["b_enc"]
        top = a.topk(k, dim=-1)
        z = torch.zeros_like(a).scatter(-1, top.indices, top.values.relu())
        loss = (z @ parts["W_dec"] + parts["b_dec"] - y[rows]).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
    return {name: part.detach() for name, part in parts.items()}


def save(folder: Path, parts: dict[str, Tensor], cfg: dict[str, Any]) -> None:
    """Write cfg.json and sae_weights.safetensors, both or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent))
    (new / "cfg.json").write_text(json.dumps(cfg, indent=1), encoding="utf-8")
    save_file({n: t.contiguous() for n, t in parts.items()}, new / "sae_weights.safetensors")
    if folder.exists():
        shutil.rmtree(folder)
    new.rename(folder)


def measure(model: Any, sae: features.FeatureDictionary, n: int) -> None:
    """Print what a split by feature is worth on the bundled model's tasks."""
    for task in demo.TASKS:
        off, carried, share, extra = 0.0, torch.zeros(3), 0.0, 0.0
        for pair in demo.prompts(task, n, seed=3):
            _, lens = model.run_with_tensorlens(pair.clean)
            start = time.process_time()
            lens.attribute(pair.answer, versus=pair.foil)
            swept = time.process_time()
            found = lens.attribute(pair.answer, versus=pair.foil, by="feature", saes=sae)
            extra += (time.process_time() - swept) / (swept - start)
            kinds = [source.node.kind for source in found.sources]
            values, size = found.values[0], float(found.values.abs().sum())
            own = torch.tensor([{"feature": 0, "error": 1}.get(kind, 2) for kind in kinds])
            sums = torch.zeros(3).index_add(0, own, values)
            carried += sums / found.target_value[0] / n
            share += float(values[own == 1].abs().sum()) / size / n
            off = max(off, found.completeness_error or 0.0)
        parts = ", ".join(
            f"{name} {float(part):.0%}"
            for name, part in zip(("features", "error", "constants"), carried, strict=True)
        )
        print(
            f"{task:>12}: {parts} of the target; error {share:.2f} of Σ|·|; sum off by {off:.0e};"
        )
        print(f"{'':>14}with the encoding {extra / n:.2f} times the processor time of the sweep")


def cost() -> None:
    """Print what a site of 16 d features costs in forward passes, in processor time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=5000, bos_token_id=None, eos_token_id=None)
    model = tensorlens_tl.wrap(transformers.GPT2LMHeadModel(config).eval())
    ids, d = torch.randint(0, 5000, (1, 100)), config.n_embd
    W = torch.nn.functional.normalize(torch.randn(16 * d, d), dim=-1)
    parts = {"W_enc": W.T, "W_dec": W, "b_enc": W[:, 0] * 0, "b_dec": W[0] * 0}
    top = {"architecture": "topk", "k": 32}
    found = features.load(parts, site="blocks.6.hook_resid_pre", config=top)
    sae = cast(features.FeatureDictionary, found)
    with torch.no_grad():
        forward = seconds(lambda: model(ids))
        _, lens = tensorlens_tl.capture(model, ids)
        x = lens.operator.states()["blocks.6.hook_resid_pre"]
        encoding = seconds(lambda: sae.encode(x))

        def reading() -> None:
            vars(lens).pop("_read", None)
            lens.attribute(3, by="feature", saes=sae)

        both = seconds(reading)  # the sweep is kept, as the target is the same
        split = seconds(lambda: lens.attribute(3, by="feature", saes=sae))
    print(f"{sae}, 100 tokens, 32 features each; in forward passes:")
    print(f"  the split beyond the sweep {split / forward:.3f}; the encoder's product")
    rest = (both - split - encoding) / forward
    print(f"  {encoding / forward:.3f}; reading what fires and its error {rest:.3f}")


def seconds(work: Callable[[], Any], times: int = 5) -> float:
    """The least processor time of some runs."""
    found = []
    for _ in range(times):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=("demo", "smollm2"), default="demo")
    parser.add_argument("--out", type=Path, help="the folder that is written")
    parser.add_argument("--cost", action="store_true", help="measure the cost alone")
    parser.add_argument("--text", type=Path, help="a text file; its lines are what is read")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--k", type=int, default=16)
    options = parser.parse_args()
    if options.cost:
        cost()
        return
    if options.out is None:
        parser.error("--out is missing. Name a folder, or pass --cost.")
    bundled = options.model == "demo"
    model = demo.load_model() if bundled else tensorlens_tl.models.smollm2()
    if options.text is not None:
        texts = [t for t in options.text.read_text(encoding="utf-8").splitlines() if len(t) > 40]
    else:
        texts = [p.clean for task in demo.TASKS for p in demo.prompts(task, 400, seed=1)]
    random.Random(0).shuffle(texts)
    layer = model.cfg.n_layers // 2
    site = f"blocks.{layer}.hook_resid_pre" if bundled else f"blocks.{layer}.hook_resid_mid"
    writes = site if bundled else f"blocks.{layer}.hook_mlp_out"
    points = [site] if bundled else [site, writes]
    # 1. What stands at the site.
    start = time.process_time()
    found = activations(model, texts[:2000], points)
    x, y = found[0], found[-1]
    # 2. The dictionary.
    parts = train(x, y, options.features, options.k, options.steps)
    cfg: dict[str, Any] = {"architecture": "topk", "k": options.k}
    cfg |= {"apply_b_dec_to_input": bundled, "metadata": {"hook_name": site}}
    if not bundled:
        cfg |= {"architecture": "transcoder", "activation": "topk"}
        cfg["metadata"] |= {"hook_name_out": writes}
    save(options.out, parts, cfg)
    sae = cast(features.FeatureDictionary, features.load(options.out))
    left = (y - sae.reconstruct(x)).square().sum() / (y - y.mean(0)).square().sum()
    print(f"{sae}: {len(x)} tokens, {time.process_time() - start:.0f} s of processor time")
    fire = float((sae.encode(x) != 0).sum(-1).float().mean())
    print(f"variance left out {float(left):.3f}; {fire:.1f} features fire at a token")
    # 3. Splits by its features.
    if bundled:
        measure(model, sae, 20)


if __name__ == "__main__":
    main()
