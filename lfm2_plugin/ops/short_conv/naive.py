"""The short convolution as two loops, over sequences and over tokens.

This text defines the op; the other implementations must agree with it.
"""

from __future__ import annotations

import torch

from lfm2_plugin.conv_batch import ConvBatch


def short_conv_naive(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    batch: ConvBatch,
    out: torch.Tensor,
) -> None:
    """See :func:`lfm2_plugin.ops.short_conv.short_conv`; writes ``out`` (T, D) and ``state`` (slots, D, L)."""
    D, K = weight.shape
    starts = batch.query_start.tolist()
    out.zero_()
    for s, slot in enumerate(batch.slots.tolist()):
        start, end = starts[s], starts[s + 1]
        if slot == batch.null_slot or start == end:
            continue
        is_decode = s < batch.num_decodes
        first = 0
        if is_decode and batch.num_accepted is not None:
            first = int(batch.num_accepted[s]) - 1
        history = bcx.new_zeros(K - 1, D)
        if batch.has_initial_state[s]:
            history = state[slot, :, first : first + K - 1].T.to(bcx.dtype)

        B, C, x = bcx[start:end].split(D, dim=-1)
        values = torch.cat([history, B * x])  # (K - 1 + q, D)
        for t in range(end - start):
            total = torch.zeros(D, dtype=torch.float32, device=bcx.device)
            for k in range(K):
                total += weight[:, k].float() * values[t + k].float()
            if bias is not None:
                total += bias.float()
            out[start + t] = C[t] * total.to(bcx.dtype)

        if is_decode:
            state[slot, :, : values.shape[0] - 1] = values[1:].T
        else:
            state[slot, :, : K - 1] = values[end - start :].T
            if batch.checkpoint_offsets is not None and batch.checkpoint_slots is not None:
                offset = int(batch.checkpoint_offsets[s - batch.num_decodes])
                copy = int(batch.checkpoint_slots[s - batch.num_decodes])
                if offset > 0 and copy != batch.null_slot:
                    state[copy, :, : K - 1] = values[offset : offset + K - 1].T
