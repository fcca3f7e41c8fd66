"""A matrix product with a weight, and the form of a weight that a CPU can read at the speed of its memory.

``linear`` is ``x @ weight.T + bias``, summed in float32 and rounded once. A weight that serves many steps is packed
first (:func:`pack`): its elements are laid out in the order in which the product reads them.
"""

from __future__ import annotations

from typing import TypeAlias

import torch

from lfm2_plugin.dispatch import chosen
from lfm2_plugin.ops.linear.naive import linear_naive
from lfm2_plugin.ops.linear.native import PackedWeight, can_pack, linear_native

Weight: TypeAlias = torch.Tensor | PackedWeight

__all__ = [
    "PackedWeight",
    "Weight",
    "can_pack",
    "linear",
    "linear_naive",
    "linear_native",
    "pack",
]


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply rows with a weight.

    Args:
        x: (T, K), any float dtype, any row stride.
        weight: (N, K) like x, plain or packed.
        bias: (N,) like x, or None.

    Returns:
        (T, N) like x.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if x.dim() != 2 or len(weight.shape) != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (T, K) and (N, K)"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype}, the weight {weight.dtype}; they must be alike")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(
            f"bias must be ({weight.shape[0]},) of {x.dtype}, got {tuple(bias.shape)} of {bias.dtype}"
        )
    run = chosen(x.device.type, linear_naive, linear_native)
    return run(x, weight, bias)


def pack(weight: torch.Tensor) -> Weight:
    """The weight (N, K) in packed form where this machine has one for it, else the weight itself.

    The packed form holds a copy; drop the plain weight to save its memory, :meth:`PackedWeight.unpack` brings it back.
    """
    return PackedWeight.of(weight) if can_pack(weight) else weight
