"""The router in vectorised torch: no value is read back, so it can be traced and captured."""

from __future__ import annotations

import torch

from lfm2_plugin.ops.router.naive import EPSILON


def route_native(
    logits: torch.Tensor,
    expert_bias: torch.Tensor | None,
    top_k: int,
    renormalise: bool,
    scaling: float,
    padding: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`lfm2_plugin.ops.router.route`."""
    scores = logits.sigmoid()
    if expert_bias is None:
        weights, ids = scores.topk(top_k, dim=-1)
    else:
        ids = (scores + expert_bias).topk(top_k, dim=-1).indices
        weights = scores.gather(1, ids)
    if renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + EPSILON)
    weights = (weights * scaling).float()
    ids = ids.to(torch.int32)
    if padding is not None:
        weights = weights.masked_fill(padding[:, None], 0.0)
        ids = ids.masked_fill(padding[:, None], -1)
    return weights, ids
