"""The short convolution on a GPU, composed of SGLang's own kernels: what runs until a GPU has run ours.

Nothing here reads a value back from the device, so a decode can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch

from .engine_api import (
    can_dispatch_fused_lfm_short_conv,
    causal_conv1d_fn,
    causal_conv1d_update,
    fused_lfm_short_conv_decode,
)

PADDING_SLOT = 0
"""SGLang's slot for rows that are no sequence; what is written there is never read."""


def decode(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """One token a sequence.

    Args:
        bcx: (S, 3 * D).
        weight: (D, K).
        bias: (D,) or None.
        state: (slots, D, K - 1), moved on in place.
        slots: (S,) int; -1 is padding.

    Returns:
        (S, D).
    """
    b, c, x = bcx.chunk(3, dim=-1)
    weight = weight.contiguous()  # SGLang's kernel takes a channel's taps side by side
    if can_dispatch_fused_lfm_short_conv(b, c, x, weight, bias, state):
        return fused_lfm_short_conv_decode(b, c, x, weight, state, slots)
    return c * causal_conv1d_update(
        b * x, state, weight, bias, activation=None, conv_state_indices=slots
    )


def extend(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    slots: torch.Tensor,
    query_start: torch.Tensor,
    has_initial_state: torch.Tensor,
    snapshots: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """A piece of prompt for each sequence.

    SGLang's fused kernel for this case is not used: its first block of a sequence reads the slot that its last block
    writes, and nothing orders the two.

    Args:
        bcx: (T, 3 * D).
        weight: as in :func:`decode`.
        bias: as in :func:`decode`.
        state: as in :func:`decode`.
        slots: as in :func:`decode`.
        query_start: (S + 1,) int32, where each sequence's tokens start.
        has_initial_state: (S,) bool.
        snapshots: after how many tokens of its query a sequence's state is copied, 0 for none, and where to, (S,) each.

    Returns:
        (T, D).
    """
    b, c, x = bcx.chunk(3, dim=-1)
    u = b * x
    if snapshots is not None:
        _write_snapshots(u, state, slots, query_start, has_initial_state, *snapshots)
    mixed = causal_conv1d_fn(
        u.transpose(0, 1).contiguous(),
        weight,
        bias,
        query_start_loc=query_start,
        cache_indices=slots,
        has_initial_state=has_initial_state,
        conv_states=state,
        activation=None,
    )
    return c * mixed.transpose(0, 1)


def _write_snapshots(
    u: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    query_start: torch.Tensor,
    has_initial_state: torch.Tensor,
    offsets: torch.Tensor,
    targets: torch.Tensor,
) -> None:
    """Before the states move on, copy what they will be after ``offsets`` tokens."""
    length = state.shape[2]
    place = offsets[:, None] - length + torch.arange(length, device=u.device)  # in the query
    rows = (query_start[:-1, None] + place).clamp(0, u.shape[0] - 1)
    history = state[slots.clamp(min=0).long()].transpose(1, 2)  # (S, K - 1, D)
    history = history.masked_fill(~has_initial_state[:, None, None], 0)
    earlier = (place + length).clamp(0, length - 1)  # column of the history
    earlier = earlier[:, :, None].expand_as(history)
    values = torch.where(
        (place < 0)[:, :, None], history.gather(1, earlier), u[rows.long()].to(state.dtype)
    )
    targets = torch.where(offsets > 0, targets, PADDING_SLOT)
    state[targets.long()] = values.transpose(1, 2)
