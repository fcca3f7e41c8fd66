"""Experts on a CPU where vLLM's kernel can't serve them: spread over ranks, or with LoRA adapters.

vLLM's grouped kernel for CPUs takes every expert id for one of its own, so under expert parallelism it reads past its
weights; and no kernel of its for CPUs takes adapters, so with LoRA on it picks a Triton kernel that a CPU hasn't. Both
are put right behind the seam that vLLM has for it (``routed_experts_cls``). Everywhere else vLLM's own choice stands.
"""

from __future__ import annotations

import torch

from lfm2_plugin.ops.moe import ExpertAdapter, Factors, moe

from .engine_api import (
    CPUUnquantizedExperts,
    FusedMoEConfig,
    FusedMoEMethodBase,
    LoRAExpertsMixin,
    QuantizationConfig,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
    UnquantizedMoeBackend,
    found_no_kernel,
    quantiser_is_there,
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
    """Experts with LoRA adapters, by the operator of ``lfm2_plugin.ops.moe``."""

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
        output.copy_(moe(hidden_states, w1, w2, weights.float(), ids, adapters))

    def _adapters(self, num_tokens: int) -> list[ExpertAdapter]:
        """The adapters that tokens of this step use, their factors as views of vLLM's buffers."""
        context = self._lora_context
        if context is None:
            return []
        slots = context.local_token_lora_mapping
        if slots is None:
            slots = context.punica_wrapper.token_lora_indices
        slots = slots[:num_tokens]
        return [
            ExpertAdapter(
                tokens=slots == slot,
                w13=_factors(context.w13_lora_a_stacked, context.w13_lora_b_stacked, slot),
                w2=_factors(context.w2_lora_a_stacked, context.w2_lora_b_stacked, slot),
            )
            for slot in slots.unique().tolist()
            if slot >= 0 and context.adapter_enabled[slot]
        ]


def _factors(
    a_stacked: tuple[torch.Tensor, ...], b_stacked: tuple[torch.Tensor, ...], slot: int
) -> list[Factors]:
    """One adapter's pairs out of vLLM's (slots, E, r, columns) and (slots, E, rows, r) buffers."""
    return [(a[slot], b[slot]) for a, b in zip(a_stacked, b_stacked, strict=True)]


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
        if not self.moe.is_lora_enabled:  # our kernel maps the ids by itself
            topk_weights, topk_ids = on_this_rank(
                topk_weights, topk_ids, layer.expert_map, layer.local_num_experts
            )
        return super().apply(layer, x, topk_weights, topk_ids, *args, **kwargs)


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
        has_amx = torch.cpu._is_amx_tile_supported()
        if not has_amx or not quantiser_is_there(quant_config) or found_no_kernel(method):
            raise _no_kernel(quant_config)
        return method


def _no_kernel(quant_config: QuantizationConfig | None) -> ValueError:
    name = "in this way" if quant_config is None else f"by {quant_config.get_name()!r}"
    return ValueError(
        f"vLLM has no kernel for experts quantised {name} on this CPU (with AMX it has some, for checkpoints that are "
        "quantised already). Serve the unquantised checkpoint, leave out --quantization, or use a GPU."
    )
