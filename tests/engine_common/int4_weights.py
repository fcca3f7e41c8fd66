"""Weights that llm-compressor has packed into four bits, multiplied out."""

from __future__ import annotations

import torch

from lfm2_plugin.checkpoint.spellings import hub_name

_PER_INT = 8


def dequantise_int4(tensors: dict[str, torch.Tensor]) -> None:
    """Put (rows, columns) float32 weights in the place of packed ones, symmetric and in groups along the columns.

    Modules get the hub's names, since transformers doesn't know llm-compressor's and leaves such experts random.
    """
    for packed_name in [name for name in tensors if name.endswith("weight_packed")]:
        name = packed_name.removesuffix("_packed")
        packed, scale = tensors.pop(packed_name), tensors.pop(f"{name}_scale").float()
        rows, columns = tensors.pop(f"{name}_shape").tolist()
        shifts = torch.arange(_PER_INT) * 4
        values = (packed.unsqueeze(-1) >> shifts & 15).view(rows, -1)[:, :columns].float() - 8
        tensors[name] = values * scale.repeat_interleave(columns // scale.shape[1], dim=1)
    for name in list(tensors):
        module, _, parameter = name.rpartition(".")
        tensors[f"{hub_name(module)}.{parameter}" if parameter == "weight" else name] = tensors.pop(
            name
        )
