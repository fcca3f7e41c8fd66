"""The attention layer: vLLM's paged attention between projections, head norms and rotary positions."""

from __future__ import annotations

import torch
from torch import nn

from lfm2_plugin.arch import Lfm2MoeArch

from .engine_api import (
    Attention,
    QKVParallelLinear,
    QuantizationConfig,
    RMSNorm,
    RowParallelLinear,
    VllmConfig,
    get_rope,
    get_tensor_model_parallel_world_size,
)


class Lfm2MoeAttention(nn.Module):
    """Grouped-query attention with a norm on every head's q and k, then rotary positions."""

    def __init__(
        self,
        arch: Lfm2MoeArch,
        vllm_config: VllmConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        self.head_dim = arch.head_dim
        self.num_heads = arch.num_heads // ranks
        # With fewer kv heads than ranks each head is on several of them.
        self.num_kv_heads = max(1, arch.num_kv_heads // ranks)
        self.q_size = self.num_heads * self.head_dim
        self.kv_size = self.num_kv_heads * self.head_dim
        self.qkv_proj = QKVParallelLinear(
            hidden_size=arch.hidden_size,
            head_size=arch.head_dim,
            total_num_heads=arch.num_heads,
            total_num_kv_heads=arch.num_kv_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.out_proj = RowParallelLinear(
            input_size=arch.num_heads * arch.head_dim,
            output_size=arch.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.out_proj",
        )
        self.rotary_emb = get_rope(
            arch.head_dim,
            max_position=arch.max_position_embeddings,
            rope_parameters=arch.rope_parameters,
            is_neox_style=True,
        )
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )
        self.q_layernorm = RMSNorm(self.head_dim, eps=arch.norm_eps)
        self.k_layernorm = RMSNorm(self.head_dim, eps=arch.norm_eps)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """positions (T,), hidden_states (T, D) -> (T, D)."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_layernorm(q.reshape(-1, self.num_heads, self.head_dim))
        k = self.k_layernorm(k.reshape(-1, self.num_kv_heads, self.head_dim))
        # Flat, since the engine's CPU kernel for rotary positions is wrong for one head a row (vLLM 0.32).
        q, k = self.rotary_emb(positions, q.reshape(-1, self.q_size), k.reshape(-1, self.kv_size))
        out, _ = self.out_proj(self.attn(q, k, v))
        return out
