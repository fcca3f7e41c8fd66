"""LoRA on a CPU: the products of all adapters of a step in torch, one group of tokens an adapter.

SGLang's kernels for LoRA need an accelerator, and its torch code loops over segments with pinned memory and knows no
experts. A step without adapters costs nothing here: SGLang then skips the LoRA layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F

from lfm2_plugin.ops.moe import ExpertAdapter

from .cpu_experts import experts_forward
from .cpu_platform import LORA_BACKEND
from .engine_api import (
    BaseLoRABackend,
    ForwardBatch,
    FusedMoEWithLoRA,
    UnquantizedFusedMoEMethod,
    generate_sequence_lengths,
)


@dataclass(frozen=True)
class AdaptedTokens:
    """The tokens of a step that use one adapter.

    Attributes:
        slot: where its factors are in SGLang's buffers.
        rank, scaling: the adapter's.
        tokens: (T,) bool.
        rows: (n,) the same as indices.
    """

    slot: int
    rank: int
    scaling: float
    tokens: torch.Tensor
    rows: torch.Tensor


@dataclass
class AdaptedBatch:
    """A step with adapters; SGLang sets the two flags."""

    groups: list[AdaptedTokens] = field(default_factory=list)
    has_active_lora: bool = False
    is_prefill: bool = False


class CpuLoRABackend(BaseLoRABackend):
    """SGLang's interface of a LoRA backend."""

    name = LORA_BACKEND
    skip_inactive_lora_batches = True

    def __init__(self, max_loras_per_batch: int, device: torch.device, **unused: Any) -> None:
        super().__init__(max_loras_per_batch, device)

    def prepare_lora_batch(
        self,
        forward_batch: ForwardBatch,
        weight_indices: list[int],
        lora_ranks: list[int],
        scalings: list[float],
        *unused: Any,
        **more_unused: Any,
    ) -> None:
        """Once a step that has adapters.

        ``weight_indices`` has the slot that each request uses, ``lora_ranks`` and ``scalings`` go by slot; a rank of 0
        is the base model's.
        """
        lengths = generate_sequence_lengths(forward_batch, device=self.device)
        slots = torch.tensor(weight_indices).repeat_interleave(lengths)
        batch = AdaptedBatch()
        for slot in sorted(set(weight_indices)):
            if lora_ranks[slot]:
                tokens = slots == slot
                rows = tokens.nonzero().squeeze(1)
                batch.groups.append(
                    AdaptedTokens(slot, lora_ranks[slot], scalings[slot], tokens, rows)
                )
        self.batch_info = batch

    def run_lora_a_sgemm(
        self, x: torch.Tensor, weights: torch.Tensor, *unused: Any, **more_unused: Any
    ) -> torch.Tensor:
        """The first of an adapter's two products, scaled: x (T, columns), weights (slots, R, columns) -> (T, R)."""
        out = x.new_zeros(x.shape[0], weights.shape[1])
        for group in self.batch_info.groups:
            factor = weights[group.slot, : group.rank]
            out[group.rows, : group.rank] = F.linear(x[group.rows], factor) * group.scaling
        return out

    def run_lora_b_sgemm(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        *unused: Any,
        base_output: torch.Tensor,
        **more_unused: Any,
    ) -> torch.Tensor:
        """The second product, x (T, R), weights (slots, rows, R), added to ``base_output`` (T, rows)."""
        for group in self.batch_info.groups:
            factor = weights[group.slot, :, : group.rank]
            base_output[group.rows] += F.linear(x[group.rows, : group.rank], factor)
        return base_output

    def run_qkv_lora(
        self,
        x: torch.Tensor,
        qkv_lora_a: torch.Tensor,
        qkv_lora_b: torch.Tensor,
        *unused: Any,
        output_offset_cpu: torch.Tensor,
        base_output: torch.Tensor,
        **more_unused: Any,
    ) -> torch.Tensor:
        """Both products for a layer of c matrices, whose rows start at ``output_offset_cpu`` (c + 1,).

        Of an adapter of rank r the first c * r lines of ``qkv_lora_a`` (slots, .., columns) are used.
        """
        offsets = output_offset_cpu.tolist()
        for group in self.batch_info.groups:
            rank = group.rank
            factor = qkv_lora_a[group.slot, : (len(offsets) - 1) * rank]
            hidden = F.linear(x[group.rows], factor) * group.scaling
            added = [
                F.linear(h, qkv_lora_b[group.slot, start:end, :rank])
                for h, (start, end) in zip(
                    hidden.split(rank, dim=-1), pairwise(offsets), strict=True
                )
            ]
            base_output[group.rows] += torch.cat(added, dim=-1)
        return base_output

    def run_gate_up_lora(
        self,
        x: torch.Tensor,
        gate_up_lora_a: torch.Tensor,
        gate_up_lora_b: torch.Tensor,
        *unused: Any,
        **options: Any,
    ) -> torch.Tensor:
        """The same for two matrices."""
        return self.run_qkv_lora(x, gate_up_lora_a, gate_up_lora_b, **options)


class CpuExpertsWithLoRA(FusedMoEWithLoRA):
    """SGLang's LoRA layer around experts, whose tokens go to ``lfm2_plugin.ops.moe`` with their adapters.

    Raises:
        ValueError: quantised experts.
    """

    def __init__(self, base_layer: Any, *args: Any, **kwargs: Any) -> None:
        if type(base_layer.quant_method) is not UnquantizedFusedMoEMethod:
            raise ValueError(
                "Adapters on quantised experts can't be served on a CPU. Serve the unquantised checkpoint, or merge "
                "the adapter into it."
            )
        super().__init__(base_layer, *args, **kwargs)

    def forward(self, hidden_states: torch.Tensor, topk_output: Any, **kwargs: Any) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        if self.lora_backend.batch_info is None:
            return self.base_layer(hidden_states, topk_output, **kwargs)
        dispatched = self.dispatcher.dispatch(hidden_states=hidden_states, topk_output=topk_output)
        adapters = [self._adapter(group) for group in self.lora_backend.batch_info.groups]
        done = experts_forward(self.quant_method, self.base_layer, dispatched, adapters)
        return self.dispatcher.combine(combine_input=done)

    def _adapter(self, group: AdaptedTokens) -> ExpertAdapter:
        """The adapter's factors as views of SGLang's buffers, where they start at multiples of the largest rank."""
        slot, rank = group.slot, group.rank
        up_a, up_b = self.gate_up_lora_a_weights[slot], self.gate_up_lora_b_weights[slot]
        down_a, down_b = self.down_lora_a_weights[slot], self.down_lora_b_weights[slot]
        second = down_a.shape[1]
        width = up_b.shape[1] // 2
        return ExpertAdapter(
            tokens=group.tokens,
            w13=[
                (up_a[:, :rank], up_b[:, :width, :rank]),
                (up_a[:, second : second + rank], up_b[:, width:, :rank]),
            ],
            w2=[(down_a[:, :rank], down_b[..., :rank])],
        )
