"""The experts one token and one expert at a time. This text defines the op; the others must agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from lfm2_plugin.ops.linear import PackedWeight, Weight


def moe_naive(
    x: torch.Tensor,
    w13: torch.Tensor | Sequence[Weight],
    w2: torch.Tensor | Sequence[Weight],
    weights: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """See :func:`lfm2_plugin.ops.moe.moe`."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for t in range(x.shape[0]):
        for weight, expert in zip(weights[t].tolist(), ids[t].tolist(), strict=True):
            if expert < 0:
                continue
            gate, up = F.linear(x[t], _plain(w13[expert])).chunk(2)
            out[t] += weight * F.linear(F.silu(gate) * up, _plain(w2[expert])).float()
    return out.to(x.dtype)


def _plain(weight: Weight) -> torch.Tensor:
    return weight.unpack() if isinstance(weight, PackedWeight) else weight
