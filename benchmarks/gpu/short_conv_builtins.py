"""The built-in models' short convolutions between their projections, of the engines' own kernels."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch

from lfm2_plugin.conv_batch import ConvBatch

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(T, D) of B, C, x (T, 3D), taps (D, K), a channel's side by side, and states (slots, D, K - 1), moved on in place."""


def vllm_kernels(batch: ConvBatch) -> Run:
    """Decodes by one kernel, prompts by another. The second is told of the step beforehand, as vLLM's metadata builder
    does once for all layers.

    Raises:
        ImportError: vLLM is not installed.
    """
    from vllm.model_executor.layers.mamba.ops.causal_conv1d import (
        causal_conv1d_fn,
        causal_conv1d_update,
    )

    d = batch.num_decodes
    starts = batch.query_start[d:] - batch.query_start[d]
    metadata = vllm_programs(starts) if batch.num_prefills else None

    def run(bcx: torch.Tensor, weight: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        b, c, x = bcx.chunk(3, dim=-1)
        u = (b * x).contiguous()
        parts = []
        if d:
            done = causal_conv1d_update(
                u[:d].contiguous(),
                state,
                weight,
                None,
                activation=None,
                conv_state_indices=batch.slots[:d],
            )
            parts.append(done)
        if batch.num_prefills:
            done = causal_conv1d_fn(
                u[d:].transpose(0, 1),
                weight,
                None,
                conv_states=state,
                query_start_loc=starts,
                cache_indices=batch.slots[d:],
                has_initial_state=batch.has_initial_state[d:],
                activation=None,
                metadata=metadata,
            )
            parts.append(done.transpose(0, 1))
        mixed = parts[0] if len(parts) == 1 else torch.vstack(parts)
        return c * mixed

    return run


def vllm_programs(starts: torch.Tensor) -> SimpleNamespace:
    """What vLLM's kernel for prompts is told, from ``starts`` (S + 1,) int32: the piece of a prompt of each program."""
    from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata

    nums, rows, offsets = compute_causal_conv1d_metadata(starts.cpu(), device=starts.device)
    return SimpleNamespace(nums_dict=nums, batch_ptr=rows, token_chunk_offset_ptr=offsets)


def sglang_kernels(batch: ConvBatch, fused: bool | None = None) -> Run:
    """One fused kernel where SGLang has one (compute capability 9.0, bfloat16, 2,048 channels, three taps), else three
    or four. A decode beside prompts is an extension by one token.

    Args:
        batch: the step.
        fused: whether the fused ones run; None asks SGLang.

    Raises:
        ImportError: SGLang is not installed.
    """
    from sglang.kernels.ops.mamba.lfm_short_conv import (
        can_dispatch_fused_lfm_short_conv,
        fused_lfm_short_conv_decode,
        fused_lfm_short_conv_prefill,
    )
    from sglang.srt.layers.attention.mamba.causal_conv1d import (
        causal_conv1d_fn,
        causal_conv1d_update,
    )

    def is_fused(*inputs: torch.Tensor | None) -> bool:
        return can_dispatch_fused_lfm_short_conv(*inputs) if fused is None else fused

    slots = batch.slots.long()
    longest = int(batch.query_start.diff().max())

    def decode(bcx: torch.Tensor, weight: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        b, c, x = bcx.chunk(3, dim=-1)
        if is_fused(b, c, x, weight, None, state):
            return fused_lfm_short_conv_decode(b, c, x, weight, state, slots)
        return c * causal_conv1d_update(
            b * x, state, weight, None, activation=None, conv_state_indices=slots
        )

    def extend(bcx: torch.Tensor, weight: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        b, c, x = bcx.chunk(3, dim=-1)
        starts, has_state = batch.query_start, batch.has_initial_state
        if is_fused(b, c, x, weight, None, state):
            return fused_lfm_short_conv_prefill(
                b, c, x, weight, state, starts, slots, has_state, longest
            )
        mixed = causal_conv1d_fn(
            (b * x).transpose(0, 1).contiguous(),
            weight,
            None,
            query_start_loc=starts,
            cache_indices=slots,
            has_initial_state=has_state,
            conv_states=state,
            activation=None,
        )
        return c * mixed.transpose(0, 1)

    return extend if batch.num_prefills else decode


BUILTINS = {"vllm": vllm_kernels, "sglang": sglang_kernels}
"""By engine."""
