"""Weights quantised by hand, as the formats define it."""

from __future__ import annotations

from typing import Any

import torch

W8A8: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            },
        }
    },
}  # fmt: skip
"""The quantization_config of int8 weights by output channel and int8 activations by token, but for what it ignores."""


def w8a8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) -> int8 values and scales (rows, 1); their product is the weight that is served."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).clamp_min(1e-8)
    return (weight.float() / scale).round().clamp(-128, 127).to(torch.int8), scale
