"""The product in torch, on a CPU through oneDNN with weights in oneDNN's own layout.

Given a plain weight, oneDNN copies it into that layout at every call. With few rows the copy costs as much as the
product, which is bound by reading the weight. Measured with N = 6144, K = 2048 in bfloat16 on one core of an EPYC
9005 (CPU time, milliseconds, plain and packed): 1 row 1.60 and 0.79, 8 rows 1.74 and 1.04, 32 rows 3.11 and 2.39, 512
rows 30.9 and 29.3; reading the weight at 30 GB/s takes 0.84.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

ROWS = 8
"""The number of rows that the layout is chosen for; the one for 8 was as good as any at 1 to 512 rows."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight (N, K) in the layout that this machine's product reads.

    Attributes:
        blocks: oneDNN's tensor; its bytes are those of the plain weight, padded to whole blocks.
        shape: (N, K).
        dtype: of the weight.
    """

    blocks: torch.Tensor
    shape: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: torch.Tensor) -> PackedWeight:
        """Pack a weight for which :func:`can_pack` holds."""
        blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
        return cls(blocks, (weight.shape[0], weight.shape[1]), weight.dtype)

    def unpack(self) -> torch.Tensor:
        """The plain weight (N, K), bit for bit."""
        return self.blocks.to_dense()


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this build of torch and this CPU have a packed layout for the weight's dtype."""
    if (
        weight.device.type != "cpu"
        or not weight.numel()
        or not torch.backends.mkldnn.is_available()
    ):
        return False
    ops = torch.ops.mkldnn
    if not hasattr(ops, "_reorder_linear_weight") or not hasattr(ops, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(ops._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32


def linear_native(
    x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See :func:`lfm2_plugin.ops.linear.linear`."""
    if isinstance(weight, PackedWeight):
        return torch.ops.mkldnn._linear_pointwise(x, weight.blocks, bias, "none", [], "")
    return F.linear(x, weight, bias)
