"""SGLang as it is, made to run on a CPU: what the plugin's SGLang side is measured against.

Stock SGLang serves no LFM2-MoE on a CPU without ``sgl_kernel``: its scheduler doesn't start, and the built-in model's
convolution is a Triton kernel. Here is the least that lets it: a platform that says it is a CPU and keeps all of
SGLang's torch code (attention, experts, linears), and the convolution in torch, state and all. SGLang finds it as a
plugin, through a folder of metadata on the path (:func:`environment`).
"""

from __future__ import annotations

import os
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn import functional as F

NAME = "stock_cpu"
ENTRY_POINTS = f"""[sglang.srt.platforms]
{NAME} = benchmarks.stock_sglang:platform
[sglang.srt.plugins]
{NAME} = benchmarks.stock_sglang:convolve_in_torch
"""
_CONV = "sglang.srt.layers.attention.mamba.causal_conv1d"


def environment() -> dict[str, str]:
    """The variables with which SGLang runs as described, with its built-in model."""
    return {"LFM2_PLUGIN": "off"} | platform_environment(NAME, ENTRY_POINTS)


def platform_environment(name: str, entry_points: str) -> dict[str, str]:
    """The variables with which SGLang runs on the platform ``name``.

    SGLang then skips the plugins of every distribution with another platform, ours among them.

    Args:
        name: of the platform, and of a distribution that is made up for it.
        entry_points: of that distribution, as in a file ``entry_points.txt``.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    metadata = folder / f"{name}-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(entry_points)
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(folder), str(root), os.environ.get("PYTHONPATH", "")])
    return {"SGLANG_PLATFORM": name, "PYTHONPATH": path}


def platform() -> str:
    """SGLang's entry point for platforms."""
    return "benchmarks.stock_sglang_platform:StockCpuPlatform"


def convolve_in_torch() -> None:
    """SGLang's entry point for plugins: the two functions that the built-in model calls."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_CONV}.causal_conv1d_fn", prefill, HookType.REPLACE)
    HookRegistry.register(f"{_CONV}.causal_conv1d_update", decode, HookType.REPLACE)


def prefill(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    query_start_loc: torch.Tensor,
    cache_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    conv_states: torch.Tensor,
    **_: object,
) -> torch.Tensor:
    """x (D, T) of sequences end to end -> (D, T); one torch convolution a sequence."""
    out = torch.empty_like(x)
    starts = query_start_loc.tolist()
    K = weight.shape[1]
    for index, (start, end) in enumerate(pairwise(starts)):
        state = conv_states[cache_indices[index]]
        history = state if has_initial_state[index] else torch.zeros_like(state)
        values = torch.cat([history.to(x.dtype), x[:, start:end]], dim=1)
        mixed = F.conv1d(values[None], weight[:, None], bias, groups=weight.shape[0])
        out[:, start:end] = mixed[0]
        state.copy_(values[:, -(K - 1) :])
    return out


def decode(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    conv_state_indices: torch.Tensor,
    **_: object,
) -> torch.Tensor:
    """x (S, D) -> (S, D), one token a sequence."""
    values = torch.cat([conv_state[conv_state_indices].to(x.dtype), x[:, :, None]], dim=2)
    conv_state[conv_state_indices] = values[:, :, 1:].to(conv_state.dtype)
    mixed = (values * weight).sum(dim=2)
    return mixed if bias is None else mixed + bias
