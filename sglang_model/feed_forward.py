"""What follows the second norm of a layer: a dense MLP in the first layers, router and experts in the others."""

from __future__ import annotations

import torch
from torch import nn

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.ops.router import route, try_kernel

from .engine_api import (
    FusedMoE,
    MergedColumnParallelLinear,
    QuantizationConfig,
    ReplicatedLinear,
    RowParallelLinear,
    SiluAndMul,
    TopK,
    TopKOutputFormat,
    add_prefix,
    bind_experts_to_routing,
    get_parallel,
    tensor_model_parallel_all_reduce,
)


class Lfm2MoeMlp(nn.Module):
    """The dense SwiGLU of the first layers: w2(silu(w1 x) * w3 x)."""

    def __init__(
        self, arch: Lfm2MoeArch, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.w13 = MergedColumnParallelLinear(
            arch.hidden_size,
            [arch.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("w13", prefix),
        )
        self.w2 = RowParallelLinear(
            arch.intermediate_size,
            arch.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("w2", prefix),
        )
        self.act_fn = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        gate_up, _ = self.w13(x)
        out, _ = self.w2(self.act_fn(gate_up))
        return out


class Lfm2MoeExperts(nn.Module):
    """Router and experts. The routing is ours, the reference's to the epsilon; the expert kernels are the engine's.

    Raises:
        ValueError: an expert backend that routes by itself (by a softmax, without the bias).
    """

    def __init__(
        self,
        arch: Lfm2MoeArch,
        layer_id: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.arch = arch
        # Never quantised: four of many experts hang on small differences of its output.
        self.gate = ReplicatedLinear(
            arch.hidden_size,
            arch.num_experts,
            bias=False,
            quant_config=None,
            prefix=add_prefix("gate", prefix),
        )
        device = next(self.gate.parameters()).device
        try_kernel(device, arch.num_experts, arch.num_experts_per_tok, torch.get_default_dtype())
        self.expert_bias = None
        if arch.use_expert_bias:
            bias = torch.zeros(arch.num_experts, dtype=torch.float32)
            self.expert_bias = nn.Parameter(bias, requires_grad=False)
        self.topk = TopK(
            top_k=arch.num_experts_per_tok,
            layer_id=layer_id,
            renormalize=arch.norm_topk_prob,
            custom_routing_function=self._route,
            output_format=TopKOutputFormat.STANDARD,
        )
        self.experts = FusedMoE(
            num_experts=arch.num_experts,
            top_k=arch.num_experts_per_tok,
            hidden_size=arch.hidden_size,
            intermediate_size=arch.moe_intermediate_size,
            layer_id=layer_id,
            reduce_results=False,  # done below: SGLang's LoRA layer around experts leaves it out
            quant_config=quant_config,
            prefix=add_prefix("experts", prefix),
        )
        bind_experts_to_routing(self.topk, self.experts)
        parallel = get_parallel()
        self.is_partial = parallel.moe_tp_size > 1 or parallel.moe_ep_size > 1

    def _route(
        self, hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """SGLang's hook for a routing of one's own: logits (T, E) -> weights (T, A), expert ids (T, A)."""
        return route(
            gating_output,
            self.expert_bias,
            topk,
            renormalise=renormalize,
            scaling=self.arch.routed_scaling_factor,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        logits, _ = self.gate(x)
        out = self.experts(x, self.topk(x, logits))
        return tensor_model_parallel_all_reduce(out) if self.is_partial else out
