"""Keeping the experts busy without an auxiliary loss: an idle expert gets a larger selection bias."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import Lfm2MoeForCausalLM
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeSparseMoeBlock, Lfm2MoeTopKRouter

Routed = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor
]  # logits (T, E), weights (T, A), experts (T, A)


class LoadBalancer:
    """Counts how many tokens each expert gets, and moves the expert biases towards even work.

    Attributes:
        counted: (T,) bool, which of a batch's tokens count (not the padding), or None for all.
        loads: per MoE layer (E,) float64, tokens sent to each expert since ``reset``.
    """

    def __init__(self, model: Lfm2MoeForCausalLM):
        blocks = {i: layer.feed_forward for i, layer in enumerate(model.model.layers)}
        self.blocks = {i: b for i, b in blocks.items() if isinstance(b, Lfm2MoeSparseMoeBlock)}
        self.counted: torch.Tensor | None = None
        self.reset()
        for layer, block in self.blocks.items():
            block.gate.register_forward_hook(self._counter(layer))

    def reset(self) -> None:
        """Forget the counts."""
        self.loads = {
            layer: torch.zeros(block.gate.num_experts, dtype=torch.float64)
            for layer, block in self.blocks.items()
        }

    def _counter(self, layer: int) -> Callable[[Lfm2MoeTopKRouter, tuple, Routed], None]:
        def count(router: Lfm2MoeTopKRouter, args: tuple, routed: Routed) -> None:
            chosen = routed[2] if self.counted is None else routed[2][self.counted]
            self.loads[layer] += torch.bincount(chosen.flatten(), minlength=router.num_experts)

        return count

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move every bias by ``rate`` towards even loads, then count afresh; their mean stays zero."""
        for layer, block in self.blocks.items():
            load = self.loads[layer]
            block.expert_bias += rate * torch.sign(load.mean() - load).float()
            block.expert_bias -= block.expert_bias.mean()
        self.reset()

    def shares(self) -> dict[int, list[float]]:
        """Per MoE layer the share of the work that each expert had since ``reset``; sums to 1."""
        return {
            layer: (load / load.sum().clamp(min=1)).tolist() for layer, load in self.loads.items()
        }
