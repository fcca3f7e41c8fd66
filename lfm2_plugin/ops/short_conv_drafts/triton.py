"""The short convolution of drafts as one launch on a GPU.

A program does one draft and one block of channels: it finds its K values by ``seen``, in the state or among the drafts
of its sequence, and leaves a result and a state. Nothing that one program writes is read by another, and the state is
only read, so the order of programs does not matter. Nothing is read back to the host and the grid follows from shapes,
so a CUDA graph can hold the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lfm2_plugin.ops.short_conv.triton import (
    CHANNELS,
    gated_input,
    gated_output,
    is_paired,
    load_state,
    store_state,
)

# As in the short convolution: a kernel of its own for some number of drafts, or some alignment of what is read value by
# value, would gain nothing.
SCALARS = ["q", "slots_ptr", "slots_stride", "seen_ptr", "seen_stride_sequence"]
SCALARS += ["seen_stride_draft", "seen_stride_place"]


@triton.jit(do_not_specialize=SCALARS)
def _short_conv_drafts(
    bcx_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    slots_ptr,
    seen_ptr,
    windows_ptr,
    out_ptr,
    D,
    q,
    slots_stride,
    seen_stride_sequence,
    seen_stride_draft,
    seen_stride_place,
    bcx_stride,
    weight_stride_channel,
    weight_stride_tap,
    state_stride_slot,
    state_stride_channel,
    state_stride_column,
    windows_stride_sequence,
    windows_stride_draft,
    windows_stride_channel,
    windows_stride_column,
    out_stride_row,
    HAS_BIAS: tl.constexpr,
    PAIRED: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    sequence, draft = row // q, row % q
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < D
    slot = tl.load(slots_ptr + sequence * slots_stride).to(tl.int64)
    wide = channels.to(tl.int64)
    cell = state_ptr + slot * state_stride_slot + wide * state_stride_channel
    places = seen_ptr + sequence * seen_stride_sequence + draft * seen_stride_draft

    value = gated_input(bcx_ptr, row, bcx_stride, D, channels, mask)
    before = ()  # newest first, as the taps
    taps = ()
    for k in tl.static_range(K):
        tap = tl.load(
            weight_ptr + channels * weight_stride_channel + (K - 1 - k) * weight_stride_tap,
            mask=mask,
            other=0.0,
        )
        taps = taps + (tap.to(tl.float32),)
    # A draft that sees any of the state sees its newest value, and of all places the first lies farthest back.
    reaches_back = (tl.load(places) < K - 1) & (slot >= 0)
    history = load_state(cell, 0, state_stride_column, mask & reaches_back, value.dtype, K, PAIRED)
    for k in tl.static_range(K - 1):
        place = tl.load(places + (K - 2 - k) * seen_stride_place).to(tl.int32)
        is_draft = place >= K - 1
        source = sequence * q + place - (K - 1)
        seen = gated_input(bcx_ptr, source, bcx_stride, D, channels, mask & is_draft)
        for age in tl.static_range(K - 1):
            seen = tl.where(place == K - 2 - age, history[age], seen)
        before = before + (seen,)
    bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, mask=mask, other=0.0).to(tl.float32)

    y = gated_output(bcx_ptr, row, bcx_stride, D, channels, mask, value, before, taps, bias, K)
    tl.store(out_ptr + row.to(tl.int64) * out_stride_row + channels, y, mask=mask)
    window = (
        windows_ptr
        + sequence.to(tl.int64) * windows_stride_sequence
        + draft * windows_stride_draft
        + wide * windows_stride_channel
    )
    store_state(window, (value,) + before, windows_stride_column, mask, K, PAIRED)


def short_conv_drafts_triton(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    slots: torch.Tensor,
    seen: torch.Tensor,
    windows: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See :func:`lfm2_plugin.ops.short_conv_drafts.short_conv_drafts`; writes ``windows`` (S, q, D, K - 1), ``out``."""
    D, K = weight.shape
    S, q, _ = seen.shape
    if not S * q:
        return
    if bcx.stride(1) != 1:
        bcx = bcx.contiguous()
    paired = is_paired(state, bcx.dtype, K) and is_paired(windows, bcx.dtype, K)
    if paired:
        state, windows = state.view(torch.int32), windows.view(torch.int32)
    block = min(CHANNELS, triton.next_power_of_2(D))
    _short_conv_drafts[(S * q, triton.cdiv(D, block))](
        bcx,
        weight,
        weight if bias is None else bias,
        state,
        slots,
        seen,
        windows,
        out,
        D,
        q,
        slots.stride(0),
        *seen.stride(),
        bcx.stride(0),
        *weight.stride(),
        *state.stride(),
        *windows.stride(),
        out.stride(0),
        HAS_BIAS=bias is not None,
        PAIRED=paired,
        K=K,
        BLOCK=block,
    )
