"""The short convolution of drafts as two loops, over sequences and over drafts."""

from __future__ import annotations

import torch


def short_conv_drafts_naive(
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
    K = weight.shape[1]
    S, q, _ = seen.shape
    B, C, x = bcx.chunk(3, dim=-1)
    for s in range(S):
        history = list(state[slots[s]].to(bcx.dtype).unbind(1))
        values = history + list((B * x)[s * q : (s + 1) * q])
        for t in range(q):
            window = torch.stack([values[place] for place in seen[s, t]], dim=1)  # (D, K)
            conv = (window.float() * weight.float()).sum(1)
            if bias is not None:
                conv += bias.float()
            out[s * q + t] = C[s * q + t] * conv.to(bcx.dtype)
            windows[s, t] = window[:, -(K - 1) :].to(state.dtype)
