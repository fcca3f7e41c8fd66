"""Which combinations of options can't be served right, found out before anything is allocated."""

from __future__ import annotations

from typing import Any

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.dispatch import check_choice

from . import SUPPORTED
from .cpu_platform import PortableCpuPlatform
from .engine_api import (
    QuantizationConfig,
    current_platform,
    get_parallel,
    get_pp_indices,
    missing_capabilities,
    sglang_version,
)


def check_operators(options: Any) -> None:
    """Refuse an ``LFM2_PLUGIN_OPS`` that would fail in the first step.

    Args:
        options: SGLang's, as resolved.

    Raises:
        ImpossibleChoice: what is wrong and what to do.
    """
    graphs = options.cuda_graph_config.decode.backend != "disabled"
    check_choice(options.device, captures_graphs=graphs)


def check_support(arch: Lfm2MoeArch, quant_config: QuantizationConfig | None) -> None:
    """Refuse what would fail later or give other tokens.

    Raises:
        ValueError: what is wrong and what to do.
    """
    if missing := missing_capabilities():
        raise ValueError(
            f"SGLang {sglang_version} lacks {', '.join(missing)}, which lfm2-plugin builds on. Install a release from "
            f"{SUPPORTED[0]} to {SUPPORTED[1]} or a newer lfm2-plugin, or set LFM2_PLUGIN=off for SGLang's own model."
        )
    parallel = get_parallel()
    ranks = parallel.tp_size
    if arch.num_heads % ranks or arch.hidden_size % ranks:
        raise ValueError(
            f"{arch.num_heads} heads and {arch.hidden_size} channels can't be divided over --tp-size {ranks}; choose a "
            "divisor of both."
        )
    if arch.num_kv_heads % ranks and ranks % arch.num_kv_heads:
        raise ValueError(
            f"{arch.num_kv_heads} kv heads fit no --tp-size {ranks}; choose a divisor or a multiple."
        )
    if arch.num_experts % parallel.moe_ep_size:
        raise ValueError(
            f"{arch.num_experts} experts can't be divided evenly over --ep-size {parallel.moe_ep_size}; choose a "
            "divisor."
        )
    if parallel.attn_tp_size != ranks:
        raise ValueError(
            "LFM2-MoE's short convolutions can't be served with --enable-dp-attention. Leave it out; "
            "--dp-size alone runs whole replicas."
        )
    check_stages(arch, parallel.pp_size)
    if (
        quant_config is not None
        and isinstance(current_platform, PortableCpuPlatform)
        and getattr(
            quant_config, "target_scheme_map", True
        )  # empty: the KV cache alone is quantised
    ):
        raise ValueError(
            f"SGLang has no kernels for weights quantised by {quant_config.get_name()!r} on this CPU (it has some for "
            "CPUs with AMX, in sgl_kernel). Serve the unquantised checkpoint, leave out --quantization, or use a GPU."
        )


def check_stages(arch: Lfm2MoeArch, stages: int) -> None:
    """Every pipeline stage needs a layer with a conv state: SGLang's pool and backend of states look for the first."""
    for number in range(stages):
        first, last = get_pp_indices(arch.num_layers, number, stages)
        if not any(first <= layer < last for layer in arch.conv_layers):
            raise ValueError(
                f"Pipeline stage {number} would hold layers {first} to {last - 1} and no short convolution (those are "
                f"{', '.join(map(str, arch.conv_layers))}), which SGLang can't serve. Choose a smaller --pp-size, or "
                "cut otherwise with SGLANG_PP_LAYER_PARTITION."
            )
