"""The gated short convolution of drafts; which of them stand is decided later, so each one leaves a state.

Draft t of a sequence sees the K - 1 values before it on its own branch of a tree, and beyond the root the sequence's
state. A chain is the tree in which each draft follows the one before; there this is ``short_conv`` on a decode of q
tokens. Values and roundings are those of :mod:`lfm2_plugin.ops.short_conv`. The state itself is moved on when it is
known which drafts stand, by a copy out of the windows.
"""

from __future__ import annotations

import torch

from lfm2_plugin.dispatch import chosen
from lfm2_plugin.ops.short_conv_drafts.naive import short_conv_drafts_naive
from lfm2_plugin.ops.short_conv_drafts.native import short_conv_drafts_native
from lfm2_plugin.ops.short_conv_drafts.trees import branches, chain, tree

_KERNEL = "lfm2_plugin.ops.short_conv_drafts.triton:short_conv_drafts_triton"

__all__ = [
    "branches",
    "chain",
    "short_conv_drafts",
    "short_conv_drafts_naive",
    "short_conv_drafts_native",
    "tree",
]


def short_conv_drafts(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    slots: torch.Tensor,
    seen: torch.Tensor,
    windows: torch.Tensor,
) -> torch.Tensor:
    """Convolve the drafts of a step.

    Args:
        bcx: (S * q, 3 * D) float32, bfloat16 or float16; rows [B, C, x] as in_proj makes them, sequence after sequence.
        weight: (D, K).
        bias: (D,) or None.
        state: (slots, D, K - 1), any float dtype; not changed.
        slots: (S,) int, the slot of each sequence. -1 is padding: its outputs and windows hold anything.
        seen: (S, q, K) int64 of :func:`branches`.
        windows: (at least S, at least q, D, K - 1) like state. In [s, t] is left the state of sequence s if its draft t
            is the last that stands. The rest stays as it is.

    Returns:
        (S * q, D) like bcx.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    _check(bcx, weight, bias, state, slots, seen, windows)
    out = bcx.new_empty(bcx.shape[0], weight.shape[0])
    S, q, _ = seen.shape
    run = chosen(bcx.device.type, short_conv_drafts_naive, short_conv_drafts_native, _KERNEL)
    run(bcx, weight, bias, state, slots, seen, windows[:S, :q], out)
    return out


def _check(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    slots: torch.Tensor,
    seen: torch.Tensor,
    windows: torch.Tensor,
) -> None:
    D, K = weight.shape
    S, q, k = seen.shape
    if k != K or bcx.shape != (S * q, 3 * D):
        raise ValueError(
            f"seen {tuple(seen.shape)} and weight ({D}, {K}) need bcx ({S * q}, {3 * D}) and {K} places a draft, "
            f"got bcx {tuple(bcx.shape)}"
        )
    if weight.dtype != bcx.dtype or (bias is not None and bias.dtype != bcx.dtype):
        raise ValueError(f"weight and bias must be {bcx.dtype} like bcx, weight is {weight.dtype}")
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias must be ({D},), got {tuple(bias.shape)}")
    if state.shape[1:] != (D, K - 1) or slots.shape != (S,):
        raise ValueError(
            f"{S} sequences need slots ({S},) and state (slots, {D}, {K - 1}), got {tuple(slots.shape)} and "
            f"{tuple(state.shape)}"
        )
    rows, drafts, *shape = windows.shape
    if rows < S or drafts < q or shape != [D, K - 1] or windows.dtype != state.dtype:
        raise ValueError(
            f"windows must be (at least {S}, at least {q}, {D}, {K - 1}) of {state.dtype} like state, got "
            f"{tuple(windows.shape)} of {windows.dtype}"
        )
