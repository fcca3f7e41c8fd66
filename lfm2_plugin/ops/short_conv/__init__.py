"""The gated short convolution of a whole engine step, conv state included.

For token t and channel c, with ``u = B * x`` rounded to the activation dtype as the Hugging Face model does::

    y[t, c] = C[t, c] * (sum over k of weight[c, k] * u[t - K + 1 + k, c]  (+ bias[c]))

The sum is taken in float32 and rounded once to the activation dtype, then multiplied by C. Values
before a sequence's query come from its state (oldest first), or are zeros where it has none.

State of a sequence, with h its K - 1 values of history and u those of its query:

- after a prefill, columns 0 .. K-2 are the last K - 1 values of ``concat(h, u)``;
- after a decode of q tokens, columns 0 .. K-3+q are ``concat(h, u)[1:]``, so that any number of
  accepted drafts can be the history of the next step (it starts at column ``num_accepted - 1``).

Other columns and other slots stay as they are. A sequence in the null slot, or without tokens,
gives zeros and touches nothing; padding rows give zeros.
"""

from __future__ import annotations

import torch

from lfm2_plugin.conv_batch import ConvBatch
from lfm2_plugin.dispatch import chosen
from lfm2_plugin.ops.short_conv.naive import short_conv_naive
from lfm2_plugin.ops.short_conv.native import short_conv_native

_KERNEL = "lfm2_plugin.ops.short_conv.triton:short_conv_triton"

__all__ = ["short_conv", "short_conv_naive", "short_conv_native"]


def short_conv(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    batch: ConvBatch,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve one step's tokens, decodes and prefills together, and move their conv states on.

    Args:
        bcx: (T, 3 * D) float32, bfloat16 or float16; rows [B, C, x] as in_proj makes them. Any row stride.
        weight: (D, K) with K in 2..8, oldest tap first.
        bias: (D,) or None.
        state: (slots, D, L) with L >= K - 1 + max_decode_len - 1, any strides, any float dtype. Changed in place.
        batch: the step's sequences; T may be more than ``batch.num_tokens`` (padding rows).
        out: (T, D) like bcx, or None to allocate. Every element is written.

    Returns:
        (T, D), ``out`` where given.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    _check(bcx, weight, bias, state, batch, out)
    if out is None:
        out = bcx.new_empty(bcx.shape[0], weight.shape[0])
    chosen(bcx.device.type, short_conv_naive, short_conv_native, _KERNEL)(
        bcx, weight, bias, state, batch, out
    )
    return out


def _check(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    batch: ConvBatch,
    out: torch.Tensor | None,
) -> None:
    """Host-side facts only: nothing here reads a tensor's values."""
    if weight.dim() != 2 or not 2 <= weight.shape[1] <= 8:
        raise ValueError(f"weight must be (D, K) with K in 2..8, got {tuple(weight.shape)}")
    D, K = weight.shape
    if bcx.dim() != 2 or bcx.shape[1] != 3 * D:
        raise ValueError(f"bcx must be (T, {3 * D}) for weight (D={D}, K), got {tuple(bcx.shape)}")
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias must be ({D},), got {tuple(bias.shape)}")
    if weight.dtype != bcx.dtype or (bias is not None and bias.dtype != bcx.dtype):
        raise ValueError(f"weight and bias must be {bcx.dtype} like bcx, weight is {weight.dtype}")
    columns = K - 1 + max(batch.max_decode_len, 1) - 1
    if state.dim() != 3 or state.shape[1] != D or state.shape[2] < columns:
        raise ValueError(
            f"state must be (slots, {D}, at least {columns}) for conv width {K} and decodes of up to "
            f"{batch.max_decode_len} tokens, got {tuple(state.shape)}"
        )
    if batch.num_tokens > bcx.shape[0]:
        raise ValueError(f"the batch has {batch.num_tokens} tokens, bcx only {bcx.shape[0]} rows")
    if batch.slots.shape[0] != batch.num_sequences:
        raise ValueError(
            f"slots has {batch.slots.shape[0]} entries for {batch.num_sequences} sequences"
        )
    if batch.query_start.shape[0] != batch.num_sequences + 1:
        raise ValueError(
            f"query_start has {batch.query_start.shape[0]} entries for {batch.num_sequences} sequences; "
            "it needs one more than there are sequences"
        )
    if batch.has_initial_state.shape[0] != batch.num_sequences:
        raise ValueError(
            f"has_initial_state has {batch.has_initial_state.shape[0]} entries for "
            f"{batch.num_sequences} sequences"
        )
    if (batch.checkpoint_offsets is None) != (batch.checkpoint_slots is None):
        raise ValueError("checkpoint_offsets and checkpoint_slots go together: give both or none")
    if out is not None and (out.shape != (bcx.shape[0], D) or out.dtype != bcx.dtype):
        raise ValueError(
            f"out must be ({bcx.shape[0]}, {D}) of {bcx.dtype}, got {tuple(out.shape)} of {out.dtype}"
        )
