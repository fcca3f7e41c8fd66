"""Which experts a token goes to, and with what weights.

As in the Hugging Face model: scores are the sigmoid of the logits, in the logits' dtype. The A experts
with the largest score + bias are chosen (the bias is float32 and counts for the choice only); their
weights are their scores without the bias, divided by (their sum + 1e-6) if asked, times the scaling
factor. Padding rows choose nobody: id -1, weight 0, so that they cost no expert any work.

On a GPU the kernel, one launch, is the default once :func:`try_kernel` has tried it there.
"""

from __future__ import annotations

import importlib

import torch

from lfm2_plugin.dispatch import chosen
from lfm2_plugin.ops.router.naive import route_naive
from lfm2_plugin.ops.router.native import route_native
from lfm2_plugin.ops.router.trial import KERNEL, kernel_devices, try_kernel

__all__ = ["kernel_devices", "route", "route_naive", "route_native", "try_kernel"]


def route(
    logits: torch.Tensor,
    expert_bias: torch.Tensor | None,
    top_k: int,
    *,
    renormalise: bool,
    scaling: float = 1.0,
    padding: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose ``top_k`` experts for each token. torch.compile traces it whole.

    Args:
        logits: (T, E), any float dtype; the scores and the weights are computed in it.
        expert_bias: (E,) float32 or None.
        top_k: A, at most E.
        renormalise: make a token's weights sum to (nearly) 1.
        scaling: multiplies the weights last.
        padding: (T,) bool, True for rows that are no tokens; or None.

    Returns:
        Weights (T, A) float32 and expert ids (T, A) int32, best expert first.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if logits.dim() != 2 or not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"cannot choose {top_k} experts by logits of shape {tuple(logits.shape)}")
    if expert_bias is not None and expert_bias.shape != logits.shape[1:]:
        raise ValueError(
            f"expert_bias must be ({logits.shape[1]},) for logits {tuple(logits.shape)}, "
            f"got {tuple(expert_bias.shape)}"
        )
    if padding is not None and padding.shape != logits.shape[:1]:
        raise ValueError(
            f"padding must be ({logits.shape[0]},) for logits {tuple(logits.shape)}, "
            f"got {tuple(padding.shape)}"
        )
    device = logits.device.type
    if device in kernel_devices:
        run = importlib.import_module(KERNEL).route_triton
    else:
        run = chosen(device, route_naive, route_native, f"{KERNEL}:route_triton")
    return run(logits, expert_bias, top_k, renormalise, scaling, padding)
