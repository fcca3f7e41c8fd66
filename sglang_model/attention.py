"""The attention layer: SGLang's paged attention between projections, head norms and rotary positions."""

from __future__ import annotations

import torch
from torch import nn

from lfm2_plugin.arch import Lfm2MoeArch

from .engine_api import (
    ForwardBatch,
    QKVParallelLinear,
    QuantizationConfig,
    RadixAttention,
    RMSNorm,
    RowParallelLinear,
    add_prefix,
    rotary_embedding,
)


class Lfm2MoeAttention(nn.Module):
    """Grouped-query attention with a norm on every head's q and k, then rotary positions."""

    def __init__(
        self,
        arch: Lfm2MoeArch,
        layer_id: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.head_dim = arch.head_dim
        self.qkv_proj = QKVParallelLinear(
            arch.hidden_size,
            arch.head_dim,
            arch.num_heads,
            arch.num_kv_heads,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
        )
        # Per rank; with fewer kv heads than ranks each head is on several of them.
        self.num_heads = self.qkv_proj.num_heads
        self.num_kv_heads = self.qkv_proj.num_kv_heads
        self.q_size = self.num_heads * self.head_dim
        self.kv_size = self.num_kv_heads * self.head_dim
        self.out_proj = RowParallelLinear(
            arch.num_heads * arch.head_dim,
            arch.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("out_proj", prefix),
        )
        self.rotary_emb = rotary_embedding(
            arch.head_dim, arch.max_position_embeddings, arch.rope_parameters
        )
        self.attn = RadixAttention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            layer_id=layer_id,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )
        self.q_layernorm = RMSNorm(self.head_dim, eps=arch.norm_eps)
        self.k_layernorm = RMSNorm(self.head_dim, eps=arch.norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        """positions (T,), hidden_states (T, D) -> (T, D)."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_layernorm(q.reshape(-1, self.head_dim)).view(-1, self.q_size)
        k = self.k_layernorm(k.reshape(-1, self.head_dim)).view(-1, self.kv_size)
        q, k = self.rotary_emb(positions, q, k)
        out, _ = self.out_proj(self.attn(q, k, v, forward_batch))
        return out
