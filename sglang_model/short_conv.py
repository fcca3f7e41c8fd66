"""The short convolution layer: in_proj -> gated causal convolution over the sequence -> out_proj.

Both projections are SGLang's own linear layers (quantised, sharded and adapted by LoRA like any other); the operator
between them is ours on every path: decode, extend, mixed and the verification of drafts.

In SGLang's CUDA graphs of prefills the operator is a gap, like attention: a step has any number of sequences of any
length, and nothing about them is of one shape. SGLang pads such a step's tokens to the next captured size.
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
    eager_on_graph,
    get_attn_backend,
    get_forward_batch,
    get_parallel,
    in_prefill_graph,
    prefill_graphs_are_wanted,
)


def _zeros_while_captured(layer: Lfm2ShortConv, bcx: torch.Tensor, mixed: torch.Tensor) -> None:
    mixed.zero_()


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
        self.gap_in_prefill_graphs = prefill_graphs_are_wanted()
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
        if self.gap_in_prefill_graphs and in_prefill_graph(forward_batch):
            mixed = bcx.new_empty(bcx.shape[0], bcx.shape[1] // 3)
            self._convolve_in_gap(bcx, mixed)
        else:
            mixed = self._convolve(bcx, forward_batch)
        out, _ = self.out_proj(mixed)
        return out

    def _convolve(self, bcx: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        states = get_attn_backend().short_conv_backend
        return states.convolve(
            self.layer_id, bcx, self.conv.by_channel, self.conv.bias, forward_batch
        )

    @eager_on_graph(capture_stub=_zeros_while_captured)
    def _convolve_in_gap(self, bcx: torch.Tensor, mixed: torch.Tensor) -> None:
        """(T, 3D) to ``mixed`` (T, D), both of which stay where they are from replay to replay; zeros for padding.

        What the step consists of is asked for here: a graph keeps the arguments of its capture.
        """
        forward_batch = get_forward_batch()
        tokens = min(forward_batch.global_num_token_non_padded_cpu, bcx.shape[0])
        if tokens:
            mixed[:tokens] = self._convolve(bcx[:tokens], forward_batch)
        mixed[tokens:].zero_()
