"""The short convolution layer: in_proj -> gated causal convolution over the sequence -> out_proj.

Both projections are SGLang's own linear layers (quantised, sharded and adapted by LoRA like any other); the operator
between them is ours on every path: decode, extend, mixed and the verification of drafts.
"""

from __future__ import annotations

import torch
from torch import nn

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.depthwise_kernel import DepthwiseKernel

from .engine_api import (
    ForwardBatch,
    MergedColumnParallelLinear,
    QuantizationConfig,
    RowParallelLinear,
    add_prefix,
    get_attn_backend,
    get_parallel,
)


class Lfm2ShortConv(nn.Module):
    """One short convolution layer; its state is in the pool of the step's attention backend."""

    def __init__(
        self,
        arch: Lfm2MoeArch,
        layer_id: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.layer_id = layer_id
        dim = arch.hidden_size
        parallel = get_parallel()
        self.conv = DepthwiseKernel(
            dim // parallel.tp_size, arch.conv_width, arch.conv_bias, parallel.tp_rank
        )
        self.in_proj = MergedColumnParallelLinear(
            dim,
            [dim] * 3,
            bias=arch.conv_bias,
            quant_config=quant_config,
            prefix=add_prefix("in_proj", prefix),
        )
        self.out_proj = RowParallelLinear(
            dim,
            dim,
            bias=arch.conv_bias,
            quant_config=quant_config,
            prefix=add_prefix("out_proj", prefix),
        )

    def forward(self, hidden_states: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        bcx, _ = self.in_proj(hidden_states)
        states = get_attn_backend().short_conv_backend
        mixed = states.convolve(self.layer_id, bcx, self.conv.weight, self.conv.bias, forward_batch)
        out, _ = self.out_proj(mixed)
        return out
