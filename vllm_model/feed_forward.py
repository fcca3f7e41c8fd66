"""What follows the second norm of a layer: a dense MLP in the first layers, router and experts in the others."""

from __future__ import annotations

import torch
from torch import nn

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.ops.router import route, try_kernel

from .cpu_experts import CpuRoutedExperts
from .engine_api import (
    FusedMoEFactory,
    GateLinear,
    MergedColumnParallelLinear,
    QuantizationConfig,
    RowParallelLinear,
    SiluAndMul,
    VllmConfig,
    on_cpu,
    padding_rows,
)


class Lfm2MoeMlp(nn.Module):
    """The dense SwiGLU of the first layers: w2(silu(w1 x) * w3 x)."""

    def __init__(
        self, arch: Lfm2MoeArch, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        width = arch.intermediate_size
        self.w13 = MergedColumnParallelLinear(
            arch.hidden_size,
            [width] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.w13",
        )
        self.w2 = RowParallelLinear(
            width, arch.hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.w2"
        )
        self.act_fn = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        gate_up, _ = self.w13(x)
        out, _ = self.w2(self.act_fn(gate_up))
        return out


class Lfm2MoeExperts(nn.Module):
    """Router and experts. The routing is ours, the reference's to the epsilon; the expert kernels are the engine's."""

    def __init__(
        self,
        arch: Lfm2MoeArch,
        vllm_config: VllmConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.arch = arch
        parallel = vllm_config.parallel_config
        redundant = parallel.eplb_config.num_redundant_experts
        self.gate = GateLinear(
            arch.hidden_size, arch.num_experts, quant_config=quant_config, prefix=f"{prefix}.gate"
        )
        device = next(self.gate.parameters()).device
        try_kernel(device, arch.num_experts, arch.num_experts_per_tok, torch.get_default_dtype())
        self.expert_bias = None
        if arch.use_expert_bias:
            bias = torch.zeros(arch.num_experts, dtype=torch.float32)
            self.expert_bias = nn.Parameter(bias, requires_grad=False)
        self.experts = FusedMoEFactory(
            num_experts=arch.num_experts,
            top_k=arch.num_experts_per_tok,
            hidden_size=arch.hidden_size,
            intermediate_size=arch.moe_intermediate_size,
            renormalize=arch.norm_topk_prob,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
            custom_routing_function=self._route,
            scoring_func="sigmoid",
            enable_eplb=parallel.enable_eplb,
            num_redundant_experts=redundant,
            ckpt_names=("w1", "w2", "w3"),
            routed_experts_cls=CpuRoutedExperts if on_cpu() else None,
        )

    def _route(
        self, hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """vLLM's hook for a routing of one's own: logits (T, E) -> weights (T, A), expert ids (T, A)."""
        return route(
            gating_output,
            self.expert_bias,
            topk,
            renormalise=renormalize,
            scaling=self.arch.routed_scaling_factor,
            padding=padding_rows(gating_output.shape[0]),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        logits, _ = self.gate(x)
        return self.experts(hidden_states=x, router_logits=logits)
