"""The experts of a layer: for each token the weighted sum of A gated feed-forwards.

``expert(x) = w2 @ (silu(w1 @ x) * (w3 @ x))``, each product rounded to the activation dtype as the
Hugging Face model does; the weighted sum is taken in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lfm2_plugin.dispatch import chosen
from lfm2_plugin.ops.linear import Weight
from lfm2_plugin.ops.moe.adapters import ExpertAdapter, Factors
from lfm2_plugin.ops.moe.naive import moe_naive
from lfm2_plugin.ops.moe.native import moe_native

__all__ = ["ExpertAdapter", "Factors", "moe", "moe_naive", "moe_native"]


def moe(
    x: torch.Tensor,
    w13: torch.Tensor | Sequence[Weight],
    w2: torch.Tensor | Sequence[Weight],
    weights: torch.Tensor,
    ids: torch.Tensor,
    adapters: Sequence[ExpertAdapter] = (),
) -> torch.Tensor:
    """Run each token through its experts.

    Args:
        x: (T, D), any float dtype.
        w13: (E, 2 * F, D) like x, rows of w1 then of w3; or E weights (2 * F, D), plain or packed.
        w2: (E, D, F) like x; or E weights (D, F).
        weights: (T, A) float32, from the router.
        ids: (T, A) int, experts in 0 .. E-1; -1 for none.
        adapters: LoRA adapters that some of the tokens use.

    Returns:
        (T, D) like x; zeros for tokens without experts.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    shape13, shape2 = _shape(w13), _shape(w2)
    if x.dim() != 2 or len(shape13) != 3 or len(shape2) != 3:
        raise ValueError("moe takes x (T, D), w13 (E, 2F, D) and w2 (E, D, F)")
    E, D, F = shape2
    if shape13 != (E, 2 * F, D) or x.shape[1] != D:
        raise ValueError(
            f"w2 {shape2} needs w13 ({E}, {2 * F}, {D}) and x (T, {D}), "
            f"got {shape13} and {tuple(x.shape)}"
        )
    if weights.shape != ids.shape or ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"weights and ids must both be ({x.shape[0]}, A), "
            f"got {tuple(weights.shape)} and {tuple(ids.shape)}"
        )
    if not x.dtype == w13[0].dtype == w2[0].dtype:
        raise ValueError(
            f"x is {x.dtype}, w13 {w13[0].dtype}, w2 {w2[0].dtype}; they must be alike"
        )
    run = chosen(x.device.type, moe_naive, moe_native)
    return run(x, w13, w2, weights, ids, adapters)


def _shape(weights: torch.Tensor | Sequence[Weight]) -> tuple[int, ...]:
    """(E, rows, columns) of the stacked weights, whatever form they have."""
    if isinstance(weights, torch.Tensor):
        return tuple(weights.shape)
    return (len(weights), *weights[0].shape)
