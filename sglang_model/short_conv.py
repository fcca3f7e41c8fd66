"""The short convolution layer: in_proj -> gated causal convolution over the sequence -> out_proj.

Both projections are SGLang's own linear layers (quantised, sharded and adapted by LoRA like any other); the operator
between them is ours on every path: decode, extend, mixed and the verification of drafts.
"""

from __future__ import annotations

import torch
from torch import nn

from lfm2_plugin.arch import Lfm2MoeArch

from .engine_api import (
    ForwardBatch,
    MergedColumnParallelLinear,
    QuantizationConfig,
    RowParallelLinear,
    add_prefix,
    get_attn_backend,
    get_parallel,
)


class DepthwiseKernel(nn.Module):
    """The convolution's weight (D, K) and bias (D,), D per rank; loads the (D, 1, K) of a checkpoint."""

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = self._parameter(channels, width)
        self.bias = self._parameter(channels) if bias else None

    def _parameter(self, *shape: int) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros(*shape), requires_grad=False)
        parameter.weight_loader = self._load  # type: ignore[attr-defined]  # SGLang's hook on a parameter
        return parameter

    @staticmethod
    def _load(parameter: nn.Parameter, loaded: torch.Tensor) -> None:
        if loaded.dim() == 3:
            loaded = loaded.squeeze(1)
        channels = parameter.shape[0]
        first = get_parallel().tp_rank * channels
        parameter.data.copy_(loaded[first : first + channels])


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
        self.conv = DepthwiseKernel(dim // get_parallel().tp_size, arch.conv_width, arch.conv_bias)
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
