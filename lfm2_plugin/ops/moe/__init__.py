"""The experts of a layer: for each token the weighted sum of A gated feed-forwards.

``expert(x) = w2 @ (silu(w1 @ x) * (w3 @ x))``, each product rounded to the activation dtype as the
Hugging Face model does; the weighted sum is taken in float32 and rounded once.
"""

from __future__ import annotations

import torch

from lfm2_plugin.dispatch import implementation
from lfm2_plugin.ops.moe.naive import moe_naive
from lfm2_plugin.ops.moe.native import moe_native

_IMPLEMENTATIONS = {"naive": moe_naive, "native": moe_native}

__all__ = ["moe", "moe_naive", "moe_native"]


def moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """Run each token through its experts.

    Args:
        x: (T, D), any float dtype.
        w13: (E, 2 * F, D) like x, rows of w1 then of w3.
        w2: (E, D, F) like x.
        weights: (T, A) float32, from the router.
        ids: (T, A) int, experts in 0 .. E-1; -1 for none.

    Returns:
        (T, D) like x; zeros for tokens without experts.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if x.dim() != 2 or w13.dim() != 3 or w2.dim() != 3:
        raise ValueError("moe takes x (T, D), w13 (E, 2F, D) and w2 (E, D, F)")
    E, D, F = w2.shape
    if w13.shape != (E, 2 * F, D) or x.shape[1] != D:
        raise ValueError(
            f"w2 {tuple(w2.shape)} needs w13 ({E}, {2 * F}, {D}) and x (T, {D}), "
            f"got {tuple(w13.shape)} and {tuple(x.shape)}"
        )
    if weights.shape != ids.shape or ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"weights and ids must both be ({x.shape[0]}, A), "
            f"got {tuple(weights.shape)} and {tuple(ids.shape)}"
        )
    if not x.dtype == w13.dtype == w2.dtype:
        raise ValueError(f"x is {x.dtype}, w13 {w13.dtype}, w2 {w2.dtype}; they must be alike")
    return _IMPLEMENTATIONS[implementation(x.device.type)](x, w13, w2, weights, ids)
