"""Small random LFM2-MoE checkpoints in the Hugging Face form, made on the spot.

Everything that a loader or a kernel could forget is visible in them: norms are not 1, biases are not 0, the expert bias
changes the choice of experts, and the layers outweigh the embedding, so that the next token depends on all of the text.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM

# Divides by TP = 2 and EP = 2; head dim 32 and expert width 64 suit vLLM's CPU kernels; three
# convolutions to an attention layer, as in the published models.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 8,
    "layer_types": [
        "conv", "conv", "full_attention", "conv", "conv", "conv", "full_attention", "conv",
    ],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_dense_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "conv_L_cache": 3,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip

# Two shapes that differ from the default, and from each other, in everything that an engine derives sizes from.
WIDE_HEADS: dict[str, Any] = {
    "hidden_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 96,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 6,
    "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention", "conv"],
    "num_dense_layers": 1,
    "conv_bias": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
    "routed_scaling_factor": 1.5,
}
UNTIED: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_hidden_layers": 5,
    "layer_types": ["full_attention", "conv", "conv", "conv", "full_attention"],
    "num_dense_layers": 0,
    "conv_L_cache": 4,
    "tie_word_embeddings": False,
    "use_expert_bias": False,
    "norm_topk_prob": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


def make_config(**overrides: Any) -> Lfm2MoeConfig:
    """The default small config with ``overrides``; layer_types is cut when only num_hidden_layers is given."""
    values = {**DEFAULTS, **overrides}
    if "num_hidden_layers" in overrides and "layer_types" not in overrides:
        values["layer_types"] = DEFAULTS["layer_types"][: overrides["num_hidden_layers"]]
    return Lfm2MoeConfig(**values)


def make_model(seed: int = 0, **overrides: Any) -> Lfm2MoeForCausalLM:
    """A random float32 model on the CPU, the same for the same arguments."""
    model = Lfm2MoeForCausalLM(make_config(**overrides)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: torch.Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("inv_freq"):
            continue
        if "embed_tokens" in name or name.startswith("lm_head"):
            fill(tensor, 0.1)  # a tied head must not simply echo the last token
        elif "embedding_norm" in name:
            fill(tensor, 0.6, 3.0)  # spreads the logits
        elif "norm" in name:
            fill(tensor, 0.2, 1.2)
        elif name.endswith("expert_bias"):
            fill(tensor, 0.3)
        elif name.endswith(".bias"):
            fill(tensor, 0.2)
        else:  # every matrix, stacked or not: its last dimension is summed over
            fill(tensor, 1 / math.sqrt(tensor.shape[-1]))
    return model


def make_checkpoint(
    folder: Path | str,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Save a random model (config.json and safetensors, per-expert names as on the Hugging Face hub); the folder.

    ``max_shard_size`` such as "300KB" splits it into several files with an index. The expert bias stays float32.
    """
    model = make_model(seed, **overrides).to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.data = buffer.data.float()
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return Path(folder)
