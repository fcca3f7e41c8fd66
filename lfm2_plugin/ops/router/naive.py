"""The router one token at a time. This text defines the op; the other implementations must agree."""

from __future__ import annotations

import torch

EPSILON = 1e-6  # of the Hugging Face model; 1e-20, as engines have it, gives other weights


def route_naive(
    logits: torch.Tensor,
    expert_bias: torch.Tensor | None,
    top_k: int,
    renormalise: bool,
    scaling: float,
    padding: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`lfm2_plugin.ops.router.route`."""
    T = logits.shape[0]
    weights = torch.zeros(T, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.full((T, top_k), -1, dtype=torch.int32, device=logits.device)
    for t in range(T):
        if padding is not None and padding[t]:
            continue
        scores = torch.sigmoid(logits[t])
        ranking = scores if expert_bias is None else scores + expert_bias
        chosen = torch.sort(ranking, descending=True, stable=True).indices[:top_k]
        chosen_scores = scores[chosen]
        if renormalise:
            chosen_scores = chosen_scores / (chosen_scores.sum() + EPSILON)
        weights[t] = (chosen_scores * scaling).float()
        ids[t] = chosen.int()
    return weights, ids
