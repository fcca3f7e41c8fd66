"""The experts one token and one expert at a time. This text defines the op; the others must agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from lfm2_plugin.ops.linear import PackedWeight, Weight
from lfm2_plugin.ops.moe.adapters import ExpertAdapter, Factors


def moe_naive(
    x: torch.Tensor,
    w13: torch.Tensor | Sequence[Weight],
    w2: torch.Tensor | Sequence[Weight],
    weights: torch.Tensor,
    ids: torch.Tensor,
    adapters: Sequence[ExpertAdapter] = (),
) -> torch.Tensor:
    """See :func:`lfm2_plugin.ops.moe.moe`."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for t in range(x.shape[0]):
        for weight, expert in zip(weights[t].tolist(), ids[t].tolist(), strict=True):
            if expert < 0:
                continue
            mine = [adapter for adapter in adapters if adapter.tokens[t]]
            gate_up = F.linear(x[t], _plain(w13[expert]))
            for adapter in mine:
                gate_up += _difference(adapter.w13, x[t], expert)
            gate, up = gate_up.chunk(2)
            hidden = F.silu(gate) * up
            y = F.linear(hidden, _plain(w2[expert]))
            for adapter in mine:
                y += _difference(adapter.w2, hidden, expert)
            out[t] += weight * y.float()
    return out.to(x.dtype)


def _difference(factors: Sequence[Factors], x: torch.Tensor, expert: int) -> torch.Tensor:
    """(columns,) -> (rows,). A shared factor has one expert for all."""
    parts = [F.linear(F.linear(x, a[expert % len(a)]), b[expert % len(b)]) for a, b in factors]
    return torch.cat(parts)


def _plain(weight: Weight) -> torch.Tensor:
    return weight.unpack() if isinstance(weight, PackedWeight) else weight
