"""The product one row at a time, in float32. This text defines the op; the others must agree."""

from __future__ import annotations

import torch

from lfm2_plugin.ops.linear.native import PackedWeight


def linear_naive(
    x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See :func:`lfm2_plugin.ops.linear.linear`."""
    plain = weight.unpack() if isinstance(weight, PackedWeight) else weight
    out = x.new_empty(x.shape[0], plain.shape[0])
    for t in range(x.shape[0]):
        row = (plain.float() * x[t].float()).sum(dim=1)
        out[t] = row if bias is None else row + bias.float()
    return out
