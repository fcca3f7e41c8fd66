"""Two things that Triton's interpreter does unlike any GPU, put right; without them a kernel can't be tried in it. And
what lets vLLM try its own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as MODULE

_mended = False


def mend() -> None:
    """Change the interpreter of this process; safe to call again."""
    global _mended
    if _mended:
        return
    _mended = True
    builder = MODULE.interpreter_builder
    MODULE._convert_float = rounding(MODULE._convert_float)
    builder.create_masked_load = with_masks_of_bits(builder.create_masked_load, place=1)
    builder.create_masked_store = with_masks_of_bits(builder.create_masked_store, place=2)


def stand_in_for_triton_cpu() -> None:
    """Before vLLM is imported: let its builds for CPUs use Triton, which they do where it has a backend for CPUs."""
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=None)


def rounding(convert: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Its conversion of floats cuts float32 off to bfloat16; GPUs round to nearest even."""

    def converted(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
        return values.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(data.shape)

    return converted


def with_masks_of_bits(access: Callable[..., Any], place: int) -> Callable[..., Any]:
    """It keeps a mask made of a block's and a single value as int32, and from Triton 3.9 on refuses that as a mask."""

    def accessed(*arguments: Any) -> Any:
        mask = arguments[place]
        if mask.data.dtype != np.bool_:
            mask = MODULE.TensorHandle(mask.data.astype(bool), mask.dtype)
        return access(*arguments[:place], mask, *arguments[place + 1 :])

    return accessed
