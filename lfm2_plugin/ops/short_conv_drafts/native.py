"""The short convolution of drafts in vectorised torch, any device that torch knows; a CUDA graph can capture it."""

from __future__ import annotations

import torch


def short_conv_drafts_native(
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
    B, C, x = bcx.split(D, dim=-1)
    history = state[slots.long()].transpose(1, 2).to(bcx.dtype)
    values = torch.cat([history, (B * x).view(S, q, D)], dim=1)
    lines = torch.arange(S, device=bcx.device)[:, None]
    taps = weight.t().float()
    # The newest value first, as in short_conv, so that a chain gives the same numbers to the bit.
    total = values[:, K - 1 :].float() * taps[K - 1]
    for k in reversed(range(K - 1)):
        total.addcmul_(values[lines, seen[:, :, k]].float(), taps[k])
    if bias is not None:
        total += bias.float()
    torch.mul(C, total.to(bcx.dtype).view(S * q, D), out=out)
    states = values[lines[:, None], seen[:, :, 1:]].to(state.dtype)  # (S, q, K - 1, D)
    windows.copy_(states.transpose(2, 3))
