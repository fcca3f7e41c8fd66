"""Experts on a CPU without ``sgl_kernel``: SGLang's dispatch in front of ``lfm2_plugin.ops.moe``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lfm2_plugin.ops.moe import ExpertAdapter, moe

from .engine_api import StandardCombineInput, StandardDispatchOutput


def experts_forward(
    method: Any,
    layer: Any,
    dispatch_output: StandardDispatchOutput,
    adapters: Sequence[ExpertAdapter] = (),
) -> StandardCombineInput:
    """The experts of ``layer`` on the tokens dispatched to it; replaces ``UnquantizedFusedMoEMethod``'s torch code.

    Args:
        method: SGLang's method object, unquantised weights.
        layer: w13_weight (E, 2F, D), w2_weight (E, D, F); or ``packed_experts``, see ``cpu_weights.py``.
        dispatch_output: hidden states (T, D), weights and expert ids (T, A).
        adapters: LoRA adapters that some of the tokens use; SGLang itself gives none.
    """
    if not _is_plain(method.moe_runner_config, layer):
        return method.forward_native(layer, dispatch_output)
    weights, ids, _ = dispatch_output.topk_output
    x = dispatch_output.hidden_states
    w13, w2 = getattr(layer, "packed_experts", None) or (
        layer.w13_weight.data,
        layer.w2_weight.data,
    )
    return StandardCombineInput(hidden_states=moe(x, w13, w2, weights.float(), ids, adapters))


def _is_plain(config: Any, layer: Any) -> bool:
    """Whether the layer is a SwiGLU like LFM2's; other models' experts are left to SGLang's code."""
    return (
        config.activation == "silu"
        and config.is_gated
        and config.gemm1_alpha is None
        and config.gemm1_clamp_limit is None
        and not config.apply_router_weight_on_input
        and config.routed_scaling_factor in (None, 1.0)
        and getattr(layer, "w13_weight_bias", None) is None
        and getattr(layer, "w2_weight_bias", None) is None
    )
