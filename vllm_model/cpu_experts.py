"""Experts on a CPU where vLLM's kernel can't serve them: spread over ranks, or with LoRA adapters.

vLLM's grouped kernel for CPUs takes every expert id for one of its own, so under expert parallelism it reads past its
weights; and no kernel of its for CPUs takes adapters, so with LoRA on it picks a Triton kernel that a CPU hasn't. Both
are put right behind the seam that vLLM has for it (``routed_experts_cls``). Everywhere else vLLM's own choice stands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .engine_api import (
    CPUUnquantizedExperts,
    FusedMoEConfig,
    FusedMoEMethodBase,
    LoRAExpertsMixin,
    MoELoRAContext,
    QuantizationConfig,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
    UnquantizedMoeBackend,
)


def on_this_rank(
    weights: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor | None, held: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn global expert ids (T, A) into this rank's, for a kernel that knows no absent expert.

    ``expert_map`` (E,) has the local id of each expert, -1 where another rank holds it; this one holds ``held``. A pair
    that isn't ours gets weight 0 and some expert of ours, spread evenly.
    """
    if expert_map is None:
        return weights, ids
    local = expert_map[ids.long()]
    absent = local < 0
    return weights.masked_fill(absent, 0), torch.where(absent, ids % held, local).to(ids.dtype)


class AdaptedCpuExperts(LoRAExpertsMixin, CPUUnquantizedExperts):
    """Experts with LoRA adapters in plain torch: a loop over the experts that have tokens, adapters inside."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """The weights stay as they are: packed for the engine's kernel they could not be multiplied here."""

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *unused: object,
        expert_map: torch.Tensor | None = None,
        **more_unused: object,
    ) -> None:
        """vLLM's interface of an experts kernel: hidden_states (T, D) -> output (T, D), written in place."""
        weights, ids = on_this_rank(topk_weights, topk_ids, expert_map, w1.shape[0])
        adapters = self._adapters(hidden_states.shape[0])
        total = torch.zeros(output.shape, dtype=torch.float32)
        for expert in ids.unique().tolist():
            tokens, place = (ids == expert).nonzero(as_tuple=True)
            x = hidden_states[tokens]
            gate_up = F.linear(x, w1[expert])
            for slot, rows in adapters:
                chosen = rows[tokens].nonzero().squeeze(1)
                gate_up[chosen] += self._w13_delta(x[chosen], slot, expert)
            gate, up = gate_up.chunk(2, dim=-1)
            hidden = F.silu(gate) * up
            out = F.linear(hidden, w2[expert])
            for slot, rows in adapters:
                chosen = rows[tokens].nonzero().squeeze(1)
                out[chosen] += self._w2_delta(hidden[chosen], slot, expert)
            total.index_add_(0, tokens, out.float() * weights[tokens, place].float().unsqueeze(1))
        output.copy_(total)

    def _adapters(self, num_tokens: int) -> list[tuple[int, torch.Tensor]]:
        """The adapters of this step: their slot and which tokens (T,) bool use them."""
        context = self._lora_context
        if context is None:
            return []
        slots = context.local_token_lora_mapping
        if slots is None:
            slots = context.punica_wrapper.token_lora_indices
        slots = slots[:num_tokens]
        return [
            (slot, slots == slot)
            for slot in slots.unique().tolist()
            if slot >= 0 and context.adapter_enabled[slot]
        ]

    def _context(self) -> MoELoRAContext:
        assert self._lora_context is not None  # there is an adapter, so vLLM has set it
        return self._lora_context

    def _w13_delta(self, x: torch.Tensor, slot: int, expert: int) -> torch.Tensor:
        """(n, D) -> (n, 2F). The adapter has one pair of factors for gate and up each, or one for both."""
        context = self._context()
        shared = 0 if context.enable_moe_shared_loras else expert
        pairs = zip(context.w13_lora_a_stacked, context.w13_lora_b_stacked, strict=True)
        return torch.cat(
            [F.linear(F.linear(x, a[slot, shared]), b[slot, expert]) for a, b in pairs], dim=-1
        )

    def _w2_delta(self, hidden: torch.Tensor, slot: int, expert: int) -> torch.Tensor:
        """(n, F) -> (n, D)."""
        context = self._context()
        shared = 0 if context.enable_moe_shared_loras else expert
        (a,), (b,) = context.w2_lora_a_stacked, context.w2_lora_b_stacked
        return F.linear(F.linear(hidden, a[slot, expert]), b[slot, shared])


class CpuExpertsMethod(UnquantizedFusedMoEMethod):
    """vLLM's method for unquantised experts, with our experts for LoRA and local expert ids for its own kernel."""

    def __init__(self, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        if moe.is_lora_enabled:
            self.unquantized_backend = UnquantizedMoeBackend.CPU
            self.experts_cls = AdaptedCpuExperts

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *args: object,
        **kwargs: object,
    ) -> torch.Tensor:
        weights, ids = on_this_rank(
            topk_weights, topk_ids, layer.expert_map, layer.local_num_experts
        )
        return super().apply(layer, x, weights, ids, *args, **kwargs)


class CpuRoutedExperts(RoutedExperts):
    """The expert weights of a layer on a CPU.

    Raises:
        ValueError: the checkpoint's experts are quantised in a way that vLLM has no kernel for on this CPU.
    """

    def _get_quant_method(
        self, prefix: str, quant_config: QuantizationConfig | None, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        try:
            method = super()._get_quant_method(prefix, quant_config, moe_config)
        except (NotImplementedError, ValueError) as error:
            raise _no_kernel(quant_config) from error
        if type(method) is UnquantizedFusedMoEMethod:
            return CpuExpertsMethod(moe_config)
        if not torch.cpu._is_amx_tile_supported():
            raise _no_kernel(quant_config)
        return method


def _no_kernel(quant_config: QuantizationConfig | None) -> ValueError:
    name = "in this way" if quant_config is None else f"by {quant_config.get_name()!r}"
    return ValueError(
        f"vLLM has no kernel for experts quantised {name} on this CPU (it has some for CPUs with AMX). Serve the "
        "unquantised checkpoint, leave out --quantization, or use a GPU."
    )
