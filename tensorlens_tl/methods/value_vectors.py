"""Earlier token-by-token maps made of attention *and* what it moves: value vectors, outputs.

Each function returns [batch, query_pos, key_pos], destination first; padding is 0. They share one
split of attention's step by source token,

    x_i  →  x_i + Σ_j F_ij + b,     F_ij = post(Σ_h A_h[i, j] v_j^h W_O^h)

with v the run's own value vectors (b_V inside) and post the frozen norm after attention, where
there is one. Costs are in L tokens, D = d_model and H heads, per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..operator import Capture, FrozenBlock
from ..sublayers import MLP, FeedForward, GatedMLP, Norm, gating_ratio
from .attention_maps import Matrix, halved, product, rows

# --- Norms of moved value vectors ----------------------------------------------------------------


def normed(norm: Norm | None, x: Tensor) -> Tensor:
    """A frozen norm with its constant; x itself where there is none."""
    return x if norm is None else norm.apply(x) + norm.bias


def linear(norm: Norm | None, x: Tensor) -> Tensor:
    """A frozen norm without its constant; x itself where there is none."""
    return x if norm is None else norm.apply(x)


@dataclass(frozen=True, eq=False)
class Split:
    """One layer's attention step, split by source token.

    Attributes:
        block: The layer.
        moved: Every token's value vectors through W_O [batch, key_pos, head, d_model].
        out: What attention puts out before the norm after it, constants included.
        resid_post: The state after the block.
        next_norms: The frozen norm that reads the state after attention, and after the block.
    """

    block: FrozenBlock
    moved: Float[Tensor, "batch key_pos head d_model"]
    out: Float[Tensor, "batch pos d_model"]
    resid_post: Float[Tensor, "batch pos d_model"]
    next_norms: tuple[Norm | None, Norm | None]

    def part(self, key: int) -> Float[Tensor, "batch query_pos d_model"]:
        """What one source adds to every destination, before the norm after attention."""
        return torch.einsum("bhq,bhd->bqd", self.pattern[..., key], self.moved[:, key])

    @cached_property
    def pattern(self) -> Float[Tensor, "batch head query_pos key_pos"]:
        """The layer's, once."""
        return self.block.attn.pattern

    def with_residual(self, key: int) -> Float[Tensor, "batch query_pos d_model"]:
        """F_ij + δ_ij x_i, for one source j."""
        part = linear(self.block.ln1_post, self.part(key))
        part[:, key] += self.block.resid_pre[:, key]
        return part

    def matrix(self, measure: Callable[[int], Tensor]) -> Matrix:
        """A number per destination for every source, side by side."""
        return torch.stack([measure(key) for key in range(self.moved.shape[1])], -1)


def splits(capture: Capture) -> Iterator[Split]:
    """Every layer's attention step, split by source token, first layer first."""
    readers = [*(block.ln1 for block in capture.blocks[1:]), capture.ln_final]
    states = [*(block.resid_pre for block in capture.blocks[1:]), capture.resid_final]
    for block, reader, after in zip(capture.blocks, readers, states, strict=True):
        attn, x = block.attn, normed(block.ln1, block.resid_pre)
        v = attn.values.apply(x) + attn.values.bias
        if attn.v_edit is not None:
            v = v + attn.v_edit.constant
        v = v.unflatten(-1, (-1, attn.weights.W_V.shape[-1]))[..., attn.kv_of, :]
        moved = torch.einsum("bkhe,hed->bkhd", v, capture.frame.cast(attn.weights.W_O))
        out = attn.apply(x) + attn.bias
        yield Split(
            block, moved, out, after, (reader if block.resid_mid is None else block.ln2, reader)
        )


def norm_attention(capture: Capture) -> Matrix:
    """Norms of weighted value vectors, ‖Σ_h A_h[i, j] v_j^h W_O^h‖, rolled out (Kobayashi 2020).

    Per layer N_ij with rows normalized, then Π_l (½ N_l + ½ I): the residual is not in N and counts
    half, as in :func:`rollout`. Source: Kobayashi et al. 2020. Cost: L² H D per layer.

    Args:
        capture: The run.

    Returns:
        The matrix; its rows sum to one.
    """
    layers = (s.matrix(lambda key, s=s: s.part(key).norm(dim=-1)) for s in splits(capture))
    return product(capture, [halved(capture, layer) for layer in layers])


def _with_next_norm(capture: Capture, which: int) -> Matrix:
    def measure(s: Split, key: int) -> Tensor:
        return linear(s.next_norms[which], s.with_residual(key)).norm(dim=-1)

    layers = (s.matrix(lambda key, s=s: measure(s, key)) for s in splits(capture))
    return product(capture, [rows(capture, layer) for layer in layers])


def norm_attention_resln(capture: Capture) -> Matrix:
    """Norms of what every token puts into the normalized state after attention, rolled out.

    Per layer ‖norm(F_ij + δ_ij x_i)‖ with rows normalized, then the product of the layers. The
    paper's blocks normalize after the residual; here the norm is the frozen one (no constant)
    that reads the state after attention: ln2, or in a parallel or attention-only block the next
    block's ln1 or ln_final. Source: Kobayashi et al. 2021. Cost: L² H D per layer.

    Args:
        capture: The run.

    Returns:
        The matrix; its rows sum to one.
    """
    return _with_next_norm(capture, 0)


def globenc(capture: Capture) -> Matrix:
    """GlobEnc: :func:`norm_attention_resln` up to the norm after the MLP's residual, MLP left out.

    ‖norm(F_ij + δ_ij x_i)‖ with the frozen norm (no constant) that reads the state after the whole
    block: the next block's ln1, or ln_final. Source: Modarressi et al. 2022, whose blocks
    normalize after each residual. Cost: L² H D per layer.

    Args:
        capture: The run.

    Returns:
        The matrix; its rows sum to one.
    """
    return _with_next_norm(capture, 1)


def alti_layers(capture: Capture) -> list[Matrix]:
    """ALTI's contributions of every layer, rows normalized; see :func:`alti`."""
    layers = []
    for s in splits(capture):
        y = s.block.resid_pre + normed(s.block.ln1_post, s.out)
        size = y.abs().sum(-1)

        def measure(key: int, s: Split = s, y: Tensor = y, size: Tensor = size) -> Tensor:
            return (size - (y - s.with_residual(key)).abs().sum(-1)).clamp_min(0)

        layers.append(rows(capture, s.matrix(measure)))
    return layers


def alti(capture: Capture) -> Matrix:
    """ALTI: how much nearer a token's vector comes to the output, layer by layer, multiplied.

    c_ij = max(0, ‖y_i‖₁ − ‖y_i − G_ij‖₁) with y_i the state after attention and
    G_ij = F_ij + δ_ij x_i, rows normalized. Source: Ferrando et al. 2022; blocks that
    normalize first have no norm after the residual. Cost: L² H D per layer.

    Args:
        capture: The run.

    Returns:
        The matrix; its rows sum to one.
    """
    return product(capture, alti_layers(capture))


# --- Value zeroing -------------------------------------------------------------------------------


def _live_scale(norm: Norm, was: Tensor, x: Tensor) -> Tensor:
    # s² = var + ε, so the scale at x is √(s² + var(x) − var(was)): ε is not needed.
    def variance(t: Tensor) -> Tensor:
        t = t - t.mean(-1, keepdim=True) if norm.weights.center else t
        return t.square().mean(-1, keepdim=True)

    squared = norm.scale.square() + variance(x) - variance(was)
    return squared.clamp_min(torch.finfo(x.dtype).tiny).sqrt()


def _live_norm(norm: Norm | None, was: Tensor, x: Tensor) -> Tensor:
    return x if norm is None else normed(replace(norm, scale=_live_scale(norm, was, x)), x)


def _live_mlp(mlp: FeedForward, was: Tensor, x: Tensor) -> Tensor:
    """The MLP as the model would run it on x: pre-activations, and so its ratios, anew."""

    def moved(pre: Tensor, W: Tensor) -> Tensor:
        return pre + (x - was) @ mlp.frame.cast(W)

    if isinstance(mlp, GatedMLP):
        w = mlp.weights
        up = moved(mlp.pre_linear, w.W_in)
        mlp = replace(mlp, pre=moved(mlp.pre, w.W_gate), pre_linear=up)
    elif isinstance(mlp, MLP):
        w, pre = mlp.weights, moved(mlp.pre, mlp.weights.W_in)
        scale = mlp.ln_scale
        if w.ln is not None and scale is not None:
            ln = Norm(mlp.frame, "ln", scale, w.ln, pre.shape[-1])
            posts = (gating_ratio(w.act, z) * z for z in (mlp.pre, pre))
            scale = _live_scale(ln, *posts)
        mlp = replace(mlp, pre=pre, ln_scale=scale)
    return mlp.apply(x) + mlp.bias


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 − cos(a, b), as ½‖a/‖a‖ − b/‖b‖‖²: exact where the two nearly agree."""
    unit = torch.nn.functional.normalize
    return 0.5 * (unit(a, dim=-1) - unit(b, dim=-1)).square().sum(-1)


def _zeroed(s: Split, key: int) -> Tensor:
    """The block's output with one token's value vectors at zero, everything behind them live."""
    block, mid, mlp = s.block, s.block.resid_mid, s.block.mlp
    attn = _live_norm(block.ln1_post, s.out, s.out - s.part(key))
    change = attn - normed(block.ln1_post, s.out)
    if mid is None or not isinstance(mlp, FeedForward):  # no MLP reads what attention wrote
        return s.resid_post + change
    was = normed(block.ln2, mid)
    raw_was = mlp.apply(was) + mlp.bias
    raw = _live_mlp(mlp, was, _live_norm(block.ln2, mid, mid + change))
    return (
        s.resid_post
        + change
        + _live_norm(block.ln2_post, raw_was, raw)
        - normed(block.ln2_post, raw_was)
    )


def value_zeroing_layers(capture: Capture) -> list[Matrix]:
    """Every layer's cosine distances, in [0, 2], not normalized; see :func:`value_zeroing`."""

    def measure(s: Split, key: int) -> Tensor:
        distance = cosine_distance(s.resid_post, _zeroed(s, key))
        # Rows that the token does not reach differ by rounding at most.
        return torch.where((s.part(key) != 0).any(-1), distance, 0)

    return [s.matrix(lambda key, s=s: measure(s, key)) for s in splits(capture)]


def value_zeroing(capture: Capture) -> Matrix:
    """Value zeroing: what a layer's output loses without a token's value vectors, rolled out.

    Per layer the cosine distance between the block's output at i and the same with v_j = 0, its
    patterns kept and its norms and MLP run anew; rows normalized, then the product of the layers.
    Source: Mohebbi et al. 2023. Cost: L runs of every block; no model is needed, as a
    norm's ε is known from its scale.

    Args:
        capture: The run.

    Returns:
        The matrix; its rows sum to one.
    """
    return product(capture, [rows(capture, layer) for layer in value_zeroing_layers(capture)])


# --- Decomposed vectors --------------------------------------------------------------------------


def decompx_vectors(capture: Capture) -> Float[Tensor, "key_pos batch query_pos d_model"]:
    """The last residual split by source token, x_i = Σ_j x_{i⇐j} + biases; see :func:`decompx`."""
    frame, x = capture.frame, capture.blocks[0].resid_pre
    vectors = frame.zeros(x.shape[-1], frame.n_pos)
    keys = torch.arange(frame.n_pos, device=frame.device)
    vectors[keys, :, keys] = (x * frame.real[..., None]).transpose(0, 1)
    for block in capture.blocks:
        attn = linear(block.ln1_post, _attend(block, linear(block.ln1, vectors)))
        state = vectors + attn
        if isinstance(block.mlp, FeedForward):
            read = vectors if block.resid_mid is None else state
            state = state + linear(block.ln2_post, _feed(block.mlp, linear(block.ln2, read)))
        vectors = state
    return vectors


def _attend(block: FrozenBlock, x: Tensor) -> Tensor:
    w, cast, added = block.attn.weights, block.attn.frame.cast, torch.zeros_like(x)
    pattern = block.attn.pattern
    for head, kv_head in enumerate(block.attn.kv_of):
        added = added + pattern[:, head] @ x @ cast(w.W_V[kv_head]) @ cast(w.W_O[head])
    return added


def _feed(mlp: FeedForward, x: Tensor) -> Tensor:
    cast = mlp.frame.cast
    if isinstance(mlp, GatedMLP):
        w, slope, share = mlp.weights, gating_ratio(mlp.weights.act, mlp.pre), mlp.convention
        on_up, on_gate = {"gate": (1, 0), "up": (0, 1), "half": (0.5, 0.5)}[share]
        post = on_up * (x @ cast(w.W_in)) * slope * mlp.pre
        post = post + on_gate * (x @ cast(w.W_gate)) * slope * mlp.pre_linear
        return post @ cast(w.W_out)
    if not isinstance(mlp, MLP):
        raise ValueError(f"expected an MLP or a gated MLP, got {type(mlp).__name__}")
    w = mlp.weights
    post = x @ cast(w.W_in) * gating_ratio(w.act, mlp.pre)
    if w.ln is not None and mlp.ln_scale is not None:
        post = Norm(mlp.frame, "ln", mlp.ln_scale, w.ln, post.shape[-1]).apply(post)
    return post @ cast(w.W_out)


def decompx(
    capture: Capture,
    query: Int[Tensor, " batch"] | None = None,
    covector: Float[Tensor, "batch d_model"] | None = None,
) -> Tensor:
    """DecompX-style vectors, carried forward token by token through every sublayer.

    x_{i⇐j} passes patterns and norm scales as the run had them and activations by the slope from
    the origin, act(z)/z; biases are left out. With those choices x_{i⇐j} = T_ij x_j before the
    final norm, reached by another road: forward, one vector per source. Source: Modarressi et al.
    2023. Cost: L forward passes of the frozen model.

    Args:
        capture: The run; its convention settles gated MLPs.
        query: A target's positions, or None.
        covector: Its u.

    Returns:
        Without a target the matrix ‖x_{i⇐j}‖ at the last residual; with one, every token's share
        of it [batch, pos], signed, u · norm(x_{i⇐j}): with the constants they sum to the target.
    """
    vectors = decompx_vectors(capture)
    if query is None or covector is None:
        real = capture.frame.real
        return torch.where(real[:, :, None], vectors.norm(dim=-1).permute(1, 2, 0), 0)
    prompts = torch.arange(capture.frame.batch, device=capture.frame.device)
    final = linear(capture.ln_final, vectors)[:, prompts, query]
    return torch.einsum("kbd,bd->bk", final, covector)
