"""Real activation patching, position by position, and its estimates: for benchmarks/circuits.py.

A unit is a residual state before a block, an MLP's output or a head's z, at one position. Truth:
the measure when the clean activation is put into the corrupted run, less the corrupted run's.
Estimates: ⟨a_clean − a_corrupted, covector⟩ with the covector of the corrupted run, from

    gradient   the real model's gradient (attribution patching)
    frozen     the operator's transpose: pattern, scales and ratios held
    frozen+qk  the same plus what the query and key inputs of the heads above make of it,
               first-order
    secant     the operator between the two runs, transposed
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tensorlens_tl
from tensorlens_tl import TensorLens
from tensorlens_tl.attribution import TargetGradient, resolve
from tensorlens_tl.attribution.splits import queries_and_keys
from tensorlens_tl.operator.secant import SecantOperator

KINDS = ("residual", "mlp", "head")


class Sites:
    """The units of a HookedTransformer's runs on one pair of prompts."""

    def __init__(self, model: Any, clean: Tensor, corrupted: Tensor, goal: tuple[int, int]):
        self.model, self.clean, self.corrupted, self.goal = model, clean, corrupted, goal
        layers = range(model.cfg.n_layers)
        self.names = {
            "residual": [f"blocks.{i}.hook_resid_pre" for i in layers],
            "mlp": [f"blocks.{i}.hook_mlp_out" for i in layers],
            "head": [f"blocks.{i}.attn.hook_z" for i in layers],
        }

    def measure(self, logits: Tensor) -> Tensor:
        """The logit difference at the end of every row."""
        return logits[:, -1, self.goal[0]] - logits[:, -1, self.goal[1]]

    def record(self, ids: Tensor, grad: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        """Activations by hook name, and the measure."""
        seen: dict[str, Tensor] = {}
        names = [name for group in self.names.values() for name in group]
        keep = [(n, lambda t, hook: seen.__setitem__(hook.name, t)) for n in names]
        with torch.set_grad_enabled(grad):
            value = self.measure(self.model.run_with_hooks(ids[None], fwd_hooks=keep))
        return seen, value

    def truth(self) -> dict[str, Tensor]:
        """Every unit patched: [layer, pos], heads [layer, head, pos]; all in one batch."""
        clean, _ = self.record(self.clean)
        n_pos, heads, layers = len(self.clean), self.model.cfg.n_heads, self.model.cfg.n_layers
        hooks, row = [], 0
        for kind in KINDS:
            for name in self.names[kind]:
                hooks.append((name, self._patch(clean[name], row, kind == "head")))
                row += n_pos * (heads if kind == "head" else 1)
        ids = self.corrupted.repeat(row, 1)
        with torch.no_grad():
            moved = self.measure(self.model.run_with_hooks(ids, fwd_hooks=hooks))
            moved = moved - self.measure(self.model(self.corrupted[None]))
        sizes = [layers * n_pos, layers * n_pos, layers * heads * n_pos]
        parts = dict(zip(KINDS, moved.split(sizes), strict=True))
        return {
            "residual": parts["residual"].view(layers, n_pos),
            "mlp": parts["mlp"].view(layers, n_pos),
            "head": parts["head"].view(layers, heads, n_pos),
        }

    @staticmethod
    def _patch(clean: Tensor, start: int, by_head: bool) -> Any:
        def hook(t: Tensor, hook: Any) -> Tensor:
            n_pos = clean.shape[1]
            at = torch.arange(n_pos)
            t = t.clone()
            for head in range(clean.shape[2]) if by_head else [0]:
                rows = start + head * n_pos + at
                if by_head:
                    t[rows, at, head] = clean[0, at, head]
                else:
                    t[rows, at] = clean[0, at]
            return t

        return hook

    def gradient(self) -> dict[str, Tensor]:
        """Attribution patching: the corrupted run's gradient."""
        clean, _ = self.record(self.clean)
        found, value = self.record(self.corrupted, grad=True)
        names = list(found)
        grads = dict(
            zip(names, torch.autograd.grad(value.sum(), list(found.values())), strict=True)
        )
        return {
            kind: torch.stack(
                [((clean[n] - found[n].detach()) * grads[n])[0].sum(-1) for n in self.names[kind]]
            )
            if kind != "head"
            else torch.stack(
                [((clean[n] - found[n].detach()) * grads[n])[0].sum(-1).T for n in self.names[kind]]
            )
            for kind in KINDS
        }

    def frozen(self, qk: bool, gate: str = "gate") -> dict[str, Tensor]:
        """The operator's covectors at the corrupted run."""
        with torch.no_grad():
            _, lens = tensorlens_tl.capture(self.model, self.corrupted[None], gate=gate)
            return self._read(site_covectors(lens, self.goal, qk))

    def secant(self) -> dict[str, Tensor]:
        """The covectors of the operator between the two runs."""
        runs = []
        with torch.no_grad():
            for ids in (self.clean, self.corrupted):
                _, lens = tensorlens_tl.capture(self.model, ids[None])
                runs.append((lens.capture, lens.operator))
            u = torch.zeros_like(lens.embedding)
            u[:, -1] = resolve(lens.capture, *self.goal).covector
            covectors = SecantOperator(*runs, u).covectors
            found: dict[tuple[int, str], Tensor] = {}
            for i, step in enumerate(lens.operator.steps):
                if any(branch.has_heads for branch in step.branches):
                    found[step.layer, "pre"] = covectors[i]
                    found[step.layer, "mid"] = covectors[i + 1]
                found[step.layer, "post"] = covectors[i + 1]
            return self._read(found)

    def _read(self, covectors: dict[tuple[int, str], Tensor]) -> dict[str, Tensor]:
        """Every unit's change between the runs, by the covector where it is written."""
        clean, _ = self.record(self.clean)
        found, _ = self.record(self.corrupted)
        out: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        for layer in range(self.model.cfg.n_layers):
            change = {
                kind: (clean[self.names[kind][layer]] - found[self.names[kind][layer]])[0]
                for kind in KINDS
            }
            pre, mid, post = (covectors[layer, where][0] for where in ("pre", "mid", "post"))
            W_O = self.model.blocks[layer].attn.W_O
            out["residual"].append((change["residual"] * pre).sum(-1))
            out["mlp"].append((change["mlp"] * post).sum(-1))
            out["head"].append(torch.einsum("phe,hed,pd->hp", change["head"], W_O, mid))
        return {kind: torch.stack(rows) for kind, rows in out.items()}


def site_covectors(
    lens: TensorLens, goal: tuple[int, int], qk: bool
) -> dict[tuple[int, str], Tensor]:
    """The target's covector at every residual site: before, inside and after each block."""
    operator = lens.operator
    trace = TargetGradient(lens.capture, operator, resolve(lens.capture, *goal)).trace
    found: dict[tuple[int, str], Tensor] = {}
    above = torch.zeros_like(trace.covectors[-2])
    end = trace.covectors[-2]
    steps = list(enumerate(operator.steps))
    for i, step in reversed(steps):
        attention = any(node.kind == "head" for b in step.branches for node in b.body.nodes())
        after = trace.covectors[i + 1] if i + 1 < len(steps) else end
        found[step.layer, "mid" if attention else "post"] = after + above
        if attention:
            if (step.layer, "post") not in found:
                found[step.layer, "post"] = after + above
            if qk:
                above = above + _through_queries_and_keys(lens, step, trace.covectors[i + 1])
            found[step.layer, "pre"] = trace.covectors[i] + above
    return found


def _through_queries_and_keys(lens: TensorLens, step: Any, covector: Tensor) -> Tensor:
    """What the query and key inputs of a layer's heads make of the residual before it."""
    side_of, total = queries_and_keys(lens.capture), torch.zeros_like(covector)
    for branch in step.branches:
        if branch.has_heads:
            for covectors in side_of(branch).readers(branch.pull_to_hidden(covector), step.state):
                total = total + covectors.wide().sum(0)
    return total
