"""A gated delta net of one run, frozen into a sublayer that is linear in its values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..maps import Conv, DeltaRule, Frame
from .activations import gating_ratio
from .attention import Attention
from .weights import DeltaNetWeights


@dataclass(frozen=True, eq=False)
class DeltaNetRun:
    """What a run shows of a gated delta net, and the parameters that are frozen with it.

    Attributes:
        qkv: Queries, keys and values side by side, before the short convolution.
        gate: Logits of the gate of the norm.
        beta: Logits of how much of a value is written.
        decay: Logits of the decay, without their bias.
        kernel: The short convolution of queries and keys.
        A_log: Logarithm of the decay's rate, per head.
        dt_bias: Bias of the decay's logits, per head.
        norm: Weight of the norm of what the recurrence gives.
        eps: The ε of that norm.
        d_key: Width of the queries and keys of one head.
        most: The largest β, 1 or 2.
    """

    qkv: Float[Tensor, "batch pos d"]
    gate: Float[Tensor, "batch pos d_values"]
    beta: Float[Tensor, "batch pos head"]
    decay: Float[Tensor, "batch pos head"]
    kernel: Float[Tensor, "d_qk kernel"]
    A_log: Float[Tensor, " head"]
    dt_bias: Float[Tensor, " head"]
    norm: Float[Tensor, " d_head"]
    eps: float
    d_key: int
    most: int = 1

    def freeze(
        self, frame: Frame, layer: int, w: DeltaNetWeights
    ) -> tuple[Attention, Float[Tensor, "batch pos d_values"]]:
        """Freeze all that is not linear in the values: gates, decay, keys, queries and the norm.

        Args:
            frame: Spans of real tokens, positions, dtype and device of the run.
            layer: Number of the block.
            w: Weights of the values and of the output.

        Returns:
            The sublayer, and the values of the run.
        """
        heads, width = w.W_O.shape[:2]
        # 1. Queries and keys: the convolution, SiLU, length 1, and one for every value head.
        first = len(self.kernel)
        qk = Conv(frame, self.kernel).apply(self.qkv[..., :first])
        qk = (qk * gating_ratio("silu", qk)).unflatten(-1, (2, -1, self.d_key))
        qk = qk * (qk.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        queries, keys = qk.repeat_interleave(heads // qk.shape[3], 3).unbind(2)
        # 2. The recurrence.
        step = torch.nn.functional.softplus(self.decay + frame.cast(self.dt_bias))
        decay = (-frame.cast(self.A_log).exp() * step).exp()
        beta = self.beta.sigmoid() * self.most
        rule = DeltaRule(frame, queries * self.d_key**-0.5, keys, beta, decay, width)
        # 3. Values, what is made of them, and the norm of that with its gate.
        v = Conv(frame, w.kernel).apply(self.qkv[..., first:])
        ratio = gating_ratio("silu", v)
        mixed = rule.apply(v * ratio).unflatten(-1, (heads, width))
        inverse = (mixed.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        gate = self.gate * gating_ratio("silu", self.gate)
        gate = gate * (inverse * frame.cast(self.norm)).flatten(2)
        return Attention(frame, layer, rule, w, value_ratio=ratio, output_ratio=gate), v * ratio
