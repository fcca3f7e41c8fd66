"""A GPU's trial of the router's kernel: whether it routes there as torch does, asked before any request is served.

No GPU had run the kernel when it became the default, so each one shows for itself that it can (decision 0018).
"""

from __future__ import annotations

import importlib
import logging

import torch

from lfm2_plugin.dispatch import ENV, is_forced
from lfm2_plugin.ops.router.native import route_native

KERNEL = "lfm2_plugin.ops.router.triton"
GPUS = ("cuda",)  # torch's name for NVIDIA's and AMD's
ROWS = 33  # programs of eight rows, the last one not full
BOUNDS = {torch.float32: 1e-5}  # relative; some 80 roundings of a float32
COARSE = 2**-6  # one rounding to bfloat16 may fall on either side, twice

kernel_devices: set[str] = set()
"""Kinds of devices where the kernel has passed, and routes where the user names no implementation."""

_tried: set[tuple[str, int, int, torch.dtype]] = set()
_log = logging.getLogger(__name__)


def try_kernel(device: torch.device, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
    """Have the kernel route on a GPU from here on, if a trial there says what torch says; else warn, and torch routes.

    For a model's constructor: it launches and reads back, which a captured graph can't hold. The first layer's call
    costs the compilation that the first request would have waited for, the others' nothing.

    Args:
        device: where the logits will be. Anything but a GPU is left alone, and so is what the user forces.
        num_experts: E.
        top_k: A.
        dtype: of the logits.
    """
    trial = (device.type, num_experts, top_k, dtype)
    if device.type not in GPUS or is_forced() or trial in _tried:
        return
    _tried.add(trial)
    try:
        fault = _fault(device, num_experts, top_k, dtype)
    except (
        Exception
    ) as error:  # whatever a compiler or a driver raises: there is another way to route
        fault = f"{type(error).__name__}: {error}"
    if fault is None:
        kernel_devices.add(device.type)
        return
    kernel_devices.discard(device.type)
    _log.warning(
        "LFM2-MoE's routing runs in torch, some ten launches a layer where the kernel has one: on this GPU the kernel "
        "failed its trial (%s). Report this with the output of `lfm2 doctor`; %s=native routes in torch without a "
        "trial.",
        fault,
        ENV,
    )


def make_trial(
    num_experts: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (ROWS, E), bias (E,) and padding (ROWS,) that leave no doubt: rankings far apart, scores in the middle
    between the roundings of 16 bits.
    """
    rows = torch.arange(ROWS, device=device)
    experts = torch.arange(num_experts, device=device)
    logits = ((5 * rows[:, None] + 3 * experts) % 17 - 8) / 2
    bias = (experts * 0.6180339887) % 1.0
    return logits.to(dtype), bias.float(), rows % 3 == 2


def _fault(device: torch.device, num_experts: int, top_k: int, dtype: torch.dtype) -> str | None:
    """How the kernel's choice differs from torch's, with and without padding; None if it doesn't."""
    route_triton = importlib.import_module(KERNEL).route_triton
    logits, bias, padding = make_trial(num_experts, dtype, device)
    for mask in (None, padding):
        weights, ids = route_triton(logits, bias, top_k, True, 1.0, mask)
        expected, expected_ids = route_native(logits, bias, top_k, True, 1.0, mask)
        if not torch.equal(ids, expected_ids):
            return f"{int((ids != expected_ids).any(dim=1).sum())} of {ROWS} tokens went to other experts"
        error = float((weights - expected).abs().max() / expected.abs().max())
        if not error <= BOUNDS.get(dtype, COARSE):
            return f"weights differ by {error:.1e} of the largest"
    return None
