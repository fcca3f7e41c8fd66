"""The short convolution as one launch for a whole step on a GPU.

The programs of the launch are of two kinds, each for one block of channels:

- *A sequence*: everything that has to do with a state. It reads the history, convolves all tokens of a decode or the
  first K - 1 of a prefill (the others don't reach back to the history), writes the checkpoint, and at last the new
  state.
- *Some rows*: of prefills, all tokens but those. It looks up whose they are and slides over them as one text.

So a slot is read and written by one program alone, reads first, and a row of the output is written once: the result
does not depend on the order in which programs run. (A program for each piece of a sequence, the last of which writes
the state that the first reads, would be a race.)

Nothing is read back to the host and the grid follows from shapes alone, so that a CUDA graph can hold the launch. What
of :class:`~lfm2_plugin.conv_batch.ConvBatch` is an ``int`` is part of the captured launch: to let one graph serve any
mix of decodes and prefills, capture it with ``num_decodes = 0``. A decode without drafts is a prefill of one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lfm2_plugin.conv_batch import ConvBatch

ROWS = 16
"""Rows that a program slides over. The K - 1 rows before them are read twice, an eighth of B and x at K = 3."""
CHANNELS = 1024
"""Channels of a program: 8 of 16 bits, one load of 16 bytes, for each of 128 threads."""

SCALARS = ["T", "S", "num_decodes", "slots_ptr", "slots_stride", "query_start_ptr", "has_state_ptr"]
SCALARS += ["accepted_ptr", "checkpoint_offsets_ptr", "checkpoint_slots_ptr"]
"""What changes from step to step and is read value by value: a kernel of its own for 1, or for what 16 divides, would
gain nothing, and be compiled while requests wait.
"""


@triton.jit
def _what_is_done(
    rows, slots_ptr, query_start_ptr, T, S, num_decodes, null_slot, slots_stride, K: tl.constexpr
):
    """Of a program's rows, one bit each from the lowest on: which are convolved here, and which become zeros.

    The others are a sequence's program's.
    """
    # The last sequence that starts at or before the row: of several that start there, the one with tokens.
    low = tl.zeros_like(rows)
    high = low + S
    left = S
    while left > 0:
        middle = (low + high + 1) // 2
        start = tl.load(query_start_ptr + middle)
        low = tl.where(start <= rows, middle, low)
        high = tl.where(start <= rows, high, middle - 1)
        left = left // 2
    inside = low < S
    slot = tl.load(slots_ptr + low * slots_stride, mask=inside, other=0)
    place = rows - tl.load(query_start_ptr + low)
    alive = inside & (slot != null_slot)
    slides = alive & (low >= num_decodes) & (place >= K - 1)
    bits = 1 << (rows - tl.min(rows, axis=0))
    convolved = tl.sum(tl.where((rows < T) & slides, bits, 0), axis=0)
    zeroed = tl.sum(tl.where((rows < T) & (alive == 0), bits, 0), axis=0)
    return convolved, zeroed


@triton.jit
def gated_input(bcx_ptr, row, bcx_stride, D, channels, mask):
    """B * x of a row, rounded to its dtype. The float32 product of two 16-bit floats is exact."""
    start = bcx_ptr + row.to(tl.int64) * bcx_stride + channels
    b = tl.load(start, mask=mask, other=0.0)
    x = tl.load(start + 2 * D, mask=mask, other=0.0)
    return (b.to(tl.float32) * x.to(tl.float32)).to(b.dtype)


@triton.jit
def gated_output(
    bcx_ptr, row, bcx_stride, D, channels, mask, value, before, taps, bias, K: tl.constexpr
):
    """C * (the taps on a row's value and on the K - 1 before it, newest first, + bias), each rounded to the dtype."""
    total = value.to(tl.float32) * taps[0]
    for k in tl.static_range(K - 1):
        total += before[k].to(tl.float32) * taps[k + 1]
    total += bias
    c = tl.load(bcx_ptr + row.to(tl.int64) * bcx_stride + D + channels, mask=mask, other=0.0)
    return (c.to(tl.float32) * total.to(value.dtype).to(tl.float32)).to(value.dtype)


@triton.jit
def _state_value(age, end, before, bcx_ptr, start, bcx_stride, D, channels, mask, K: tl.constexpr):
    """The value ``age`` places before token ``end`` of a query, which may lie in the history ``before`` it."""
    place = end - age
    value = gated_input(bcx_ptr, start + place, bcx_stride, D, channels, mask & (place >= 0))
    for k in tl.static_range(K - 1):
        value = tl.where(place == -1 - k, before[k], value)
    return value


@triton.jit
def load_state(
    cell, first, stride_column, mask, dtype: tl.constexpr, K: tl.constexpr, PAIRED: tl.constexpr
):
    """The K - 1 columns from ``first`` on, newest first."""
    values = ()
    if PAIRED:
        pair = tl.load(cell, mask=mask, other=0)
        newest = (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
        values = (newest, pair.to(tl.int16).to(dtype, bitcast=True))
    else:
        for k in tl.static_range(K - 1):
            value = tl.load(cell + (first + K - 2 - k) * stride_column, mask=mask, other=0.0)
            values = values + (value.to(dtype),)
    return values


@triton.jit
def store_state(cell, values, stride_column, mask, K: tl.constexpr, PAIRED: tl.constexpr):
    """The first K - 1 columns from ``values``, newest first."""
    if PAIRED:
        newest = values[0].to(tl.int16, bitcast=True).to(tl.int32) << 16
        oldest = values[1].to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        tl.store(cell, newest | oldest, mask=mask)
    else:
        for k in tl.static_range(K - 1):
            value = values[k].to(cell.dtype.element_ty)
            tl.store(cell + (K - 2 - k) * stride_column, value, mask=mask)


@triton.jit(do_not_specialize=SCALARS)
def _short_conv(
    bcx_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    out_ptr,
    slots_ptr,
    query_start_ptr,
    has_state_ptr,
    accepted_ptr,
    checkpoint_offsets_ptr,
    checkpoint_slots_ptr,
    T,
    D,
    S,
    num_decodes,
    null_slot,
    slots_stride,
    bcx_stride,
    weight_stride_channel,
    weight_stride_tap,
    state_stride_slot,
    state_stride_channel,
    state_stride_column,
    out_stride_row,
    out_stride_channel,
    HAS_BIAS: tl.constexpr,
    HAS_ACCEPTED: tl.constexpr,
    HAS_CHECKPOINTS: tl.constexpr,
    PAIRED: tl.constexpr,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    DECODE_LEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < D
    dtype = bcx_ptr.dtype.element_ty

    taps = ()  # newest first
    for k in tl.static_range(K):
        tap = tl.load(
            weight_ptr + channels * weight_stride_channel + (K - 1 - k) * weight_stride_tap,
            mask=mask,
            other=0.0,
        )
        taps = taps + (tap.to(tl.float32),)
    bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + channels * out_stride_channel

    if program < S:
        sequence = program
        slot = tl.load(slots_ptr + sequence * slots_stride).to(tl.int64)
        start = tl.load(query_start_ptr + sequence)
        length = tl.load(query_start_ptr + sequence + 1) - start
        if (slot != null_slot) & (length > 0):
            is_decode = sequence < num_decodes
            has_state = tl.load(has_state_ptr + sequence).to(tl.int32) != 0
            first = 0
            if HAS_ACCEPTED:
                first = tl.load(accepted_ptr + sequence, mask=is_decode, other=1) - 1
            state_ptrs = state_ptr + channels.to(tl.int64) * state_stride_channel
            cell = state_ptrs + slot * state_stride_slot
            history = load_state(
                cell, first, state_stride_column, mask & has_state, dtype, K, PAIRED
            )
            # Other threads of this program may write what this one reads.
            tl.debug_barrier()

            before = history
            for t in tl.static_range(HEAD):
                live = (t < length) & (is_decode | (t < K - 1))
                row = start + t
                value = gated_input(bcx_ptr, row, bcx_stride, D, channels, mask & live)
                y = gated_output(
                    bcx_ptr, row, bcx_stride, D, channels, mask & live, value, before, taps, bias, K
                )
                tl.store(out_ptrs + row.to(tl.int64) * out_stride_row, y, mask=mask & live)
                if t == 0:
                    first_value = value
                elif t < DECODE_LEN:
                    # A decode's state grows by each draft, for as long as it may be refused.
                    column = cell + (K - 2 + t) * state_stride_column
                    grown = value.to(state_ptr.dtype.element_ty)
                    tl.store(column, grown, mask=mask & live & is_decode)
                before = (value,) + before[: K - 2]

            if HAS_CHECKPOINTS:
                prefill = tl.maximum(sequence - num_decodes, 0)
                offset = tl.load(checkpoint_offsets_ptr + prefill, mask=is_decode == 0, other=0)
                copy = tl.load(checkpoint_slots_ptr + prefill, mask=is_decode == 0, other=null_slot)
                kept = (offset > 0) & (copy != null_slot)
                values = ()
                for k in tl.static_range(K - 1):
                    value = _state_value(
                        k + 1,
                        offset,
                        history,
                        bcx_ptr,
                        start,
                        bcx_stride,
                        D,
                        channels,
                        mask & kept,
                        K,
                    )
                    values = values + (value,)
                target = state_ptrs + copy.to(tl.int64) * state_stride_slot
                store_state(target, values, state_stride_column, mask & kept, K, PAIRED)

            # After a decode's first token, whose value is at hand, or a prefill's last.
            end = tl.where(is_decode, 1, length)
            values = ()
            for k in tl.static_range(K - 1):
                absent = mask & ((k > 0) | (is_decode == 0))
                value = _state_value(
                    k + 1, end, history, bcx_ptr, start, bcx_stride, D, channels, absent, K
                )
                if k == 0:
                    value = tl.where(is_decode, first_value, value)
                values = values + (value,)
            store_state(cell, values, state_stride_column, mask, K, PAIRED)
    else:
        first_row = (program - S) * ROWS
        convolved, zeroed = _what_is_done(
            first_row + tl.arange(0, ROWS),
            slots_ptr,
            query_start_ptr,
            T,
            S,
            num_decodes,
            null_slot,
            slots_stride,
            K,
        )
        if (convolved | zeroed) != 0:
            read = mask & (convolved != 0)
            before = ()
            for k in tl.static_range(K - 1):
                row = first_row - 1 - k
                value = gated_input(bcx_ptr, row, bcx_stride, D, channels, read & (row >= 0))
                before = before + (value,)
            for t in tl.static_range(ROWS):
                row = first_row + t
                slides = ((convolved >> t) & 1) != 0
                value = gated_input(bcx_ptr, row, bcx_stride, D, channels, read & (row < T))
                y = gated_output(
                    bcx_ptr,
                    row,
                    bcx_stride,
                    D,
                    channels,
                    mask & slides,
                    value,
                    before,
                    taps,
                    bias,
                    K,
                )
                y = tl.where(slides, y.to(tl.float32), 0.0).to(dtype)  # padding may hold NaN
                written = mask & ((((convolved | zeroed) >> t) & 1) != 0)
                tl.store(out_ptrs + row.to(tl.int64) * out_stride_row, y, mask=written)
                before = (value,) + before[: K - 2]


def short_conv_triton(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    batch: ConvBatch,
    out: torch.Tensor,
) -> None:
    """See :func:`lfm2_plugin.ops.short_conv.short_conv`; writes ``out`` (T, D) and ``state`` (slots, D, L)."""
    D, K = weight.shape
    T, S = bcx.shape[0], batch.num_sequences
    if not T:
        return
    if bcx.stride(1) != 1:
        bcx = bcx.contiguous()
    paired = is_paired(state, bcx.dtype, K)
    if paired:
        state = state.view(torch.int32)
    block = min(CHANNELS, triton.next_power_of_2(D))
    nothing = batch.slots  # for pointers that are not read
    _short_conv[(S + triton.cdiv(T, ROWS), triton.cdiv(D, block))](
        bcx,
        weight,
        weight if bias is None else bias,
        state,
        out,
        batch.slots,
        batch.query_start,
        batch.has_initial_state,
        nothing if batch.num_accepted is None else batch.num_accepted,
        nothing if batch.checkpoint_offsets is None else batch.checkpoint_offsets,
        nothing if batch.checkpoint_slots is None else batch.checkpoint_slots,
        T,
        D,
        S,
        batch.num_decodes,
        batch.null_slot,
        batch.slots.stride(0),
        bcx.stride(0),
        *weight.stride(),
        *state.stride(),
        *out.stride(),
        HAS_BIAS=bias is not None,
        HAS_ACCEPTED=batch.num_accepted is not None,
        HAS_CHECKPOINTS=batch.checkpoint_offsets is not None,
        PAIRED=paired,
        K=K,
        HEAD=max(K - 1, batch.max_decode_len),
        DECODE_LEN=batch.max_decode_len,
        ROWS=ROWS,
        BLOCK=block,
    )


def is_paired(state: torch.Tensor, dtype: torch.dtype, K: int) -> bool:
    """Whether a channel's state (..., D, K - 1) is two 16-bit values side by side, as SGLang has them.

    They are read and written as one 32-bit integer, four channels at once; alone, each value would be an access of its
    own.
    """
    halves = K == 3 and state.dtype == dtype and dtype.itemsize == 2
    *outer, channel, column = state.stride()
    side_by_side = state.shape[-1] == 2 and (channel, column) == (2, 1)
    even = not any(n % 2 for n in (*outer, state.storage_offset()))
    return halves and side_by_side and even and state.data_ptr() % 4 == 0
