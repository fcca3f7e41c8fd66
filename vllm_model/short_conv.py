"""The short convolution layer: in_proj -> gated causal convolution over the sequence -> out_proj.

Both projections are vLLM's own linear layers (quantised, sharded and adapted by LoRA like any other) and lie outside
the opaque operator, so they are compiled with what surrounds them. The operator between them is ours on a CPU, and on a
GPU where ``LFM2_PLUGIN_OPS`` names one; else, until a GPU has run our kernel, it is composed of the engine's.
"""

from __future__ import annotations

import torch
from torch import nn

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.depthwise_kernel import DepthwiseKernel
from lfm2_plugin.dispatch import is_forced
from lfm2_plugin.ops.short_conv import short_conv

from .conv_state import ConvStatePage, ConvStepMetadata
from .engine_api import (
    MergedColumnParallelLinear,
    QuantizationConfig,
    RowParallelLinear,
    VllmConfig,
    causal_conv1d_fn,
    causal_conv1d_update,
    get_forward_context,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    short_conv_op,
)


class Lfm2ShortConv(nn.Module):
    """One short convolution layer.

    Args:
        arch: the model.
        page: the cache page that holds this layer's state.
        page_index: its place in the page.
        prefix: the layer's name in vLLM, which is also what the operator finds it by.
    """

    def __init__(
        self,
        arch: Lfm2MoeArch,
        page: ConvStatePage,
        page_index: int,
        vllm_config: VllmConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.page_name = page.name
        self.page_index = page_index
        dim = arch.hidden_size
        self.dim = dim // get_tensor_model_parallel_world_size()
        self.max_query_len = 1 + vllm_config.num_speculative_tokens
        self.conv = DepthwiseKernel(
            self.dim, arch.conv_width, arch.conv_bias, get_tensor_model_parallel_rank()
        )
        self.in_proj = MergedColumnParallelLinear(
            input_size=dim,
            output_sizes=[dim] * 3,
            bias=arch.conv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.in_proj",
        )
        self.out_proj = RowParallelLinear(
            input_size=dim,
            output_size=dim,
            bias=arch.conv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.out_proj",
        )
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        bcx, _ = self.in_proj(hidden_states)
        mixed = bcx.new_empty(bcx.shape[0], self.dim)
        short_conv_op(bcx, mixed, self.prefix)
        out, _ = self.out_proj(mixed)
        return out

    def _step(self) -> tuple[ConvStepMetadata, torch.Tensor] | None:
        """This step's metadata and state (slots, D, L), or None in a profiling or dummy run.

        Raises:
            RuntimeError: a step that has metadata, but none for this layer's page.
        """
        context = get_forward_context()
        if context.attn_metadata is None:
            return None
        metadata = context.attn_metadata.get(self.page_name)
        if metadata is None:
            raise RuntimeError(
                f"{self.prefix}: vLLM runs a step without metadata for {self.page_name}, which holds this layer's "
                "state. Report this with the output of `lfm2 doctor`: the convolution can't be computed."
            )
        page = context.no_compile_layers[self.page_name]
        return metadata, page.state(self.page_index)

    def forward_native(self, hidden_states: torch.Tensor, output: torch.Tensor) -> None:
        """The operator of our own: reads B, C, x (T, 3D) from ``hidden_states``, writes all of ``output`` (T, D)."""
        step = self._step()
        if step is None:
            output.zero_()
            return
        metadata, state = step
        short_conv(
            hidden_states, self.conv.by_channel, self.conv.bias, state, metadata.batch, out=output
        )

    def forward_cuda(self, hidden_states: torch.Tensor, output: torch.Tensor) -> None:
        """The operator on a GPU; ``output`` is fully written, padding rows with zeros."""
        if is_forced():
            self.forward_native(hidden_states, output)
            return
        step = self._step()
        if step is None:
            output.zero_()
            return
        metadata, state = step
        decode, prefill = metadata.num_decode_tokens, metadata.num_prefill_tokens
        b, c, x = hidden_states[: decode + prefill].chunk(3, dim=-1)
        u = b * x
        if decode:
            output[:decode] = c[:decode] * self._decode(u[:decode], state, metadata)
        if prefill:
            self._write_checkpoints(u[decode:], state, metadata)
            mixed = causal_conv1d_fn(
                u[decode:].transpose(0, 1),
                self.conv.by_channel,
                self.conv.bias,
                conv_states=state,
                query_start_loc=metadata.query_start_loc_p,
                cache_indices=metadata.state_indices_tensor_p,
                has_initial_state=metadata.has_initial_states_p,
                activation=None,
                metadata=metadata,
            )
            output[decode : decode + prefill] = c[decode:] * mixed.transpose(0, 1)[:prefill]
        output[decode + prefill :].zero_()

    def _decode(
        self, u: torch.Tensor, state: torch.Tensor, metadata: ConvStepMetadata
    ) -> torch.Tensor:
        drafts = {}
        if metadata.num_accepted_tokens is not None:
            drafts = {
                "num_accepted_tokens": metadata.num_accepted_tokens,
                "query_start_loc": metadata.query_start_loc_d,
                "max_query_len": self.max_query_len,
            }
        return causal_conv1d_update(
            u.contiguous(),
            state,
            self.conv.by_channel,
            self.conv.bias,
            activation=None,
            conv_state_indices=metadata.state_indices_tensor_d,
            **drafts,
        )

    def _write_checkpoints(
        self, u: torch.Tensor, state: torch.Tensor, metadata: ConvStepMetadata
    ) -> None:
        """Leave each prefill's state at its checkpoint. A checkpoint lies at least K-1 tokens into its query."""
        batch = metadata.batch
        if batch is None or batch.checkpoint_offsets is None:
            return
        width = self.conv.weight.shape[0] - 1
        ends = metadata.query_start_loc_p[:-1] + batch.checkpoint_offsets
        rows = ends.unsqueeze(1) + torch.arange(-width, 0, device=u.device)
        # A row without a checkpoint writes what it finds to the null block, which nobody reads.
        slots = batch.checkpoint_slots.long()
        state[slots, :, :width] = u[rows.clamp_(min=0).long()].transpose(1, 2)
