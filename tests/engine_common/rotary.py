"""Rotary embeddings as transformers makes them: what each engine has to come to for every kind that is served."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Lfm2MoeConfig
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeRotaryEmbedding

from lfm2_plugin.arch import Lfm2MoeArch

HEAD_DIM, POSITIONS = 32, 2048
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": YARN,
    "yarn, other bounds": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn, its own scale": {**YARN, "attention_factor": 1.3},
    "yarn, no scale": {**YARN, "attention_factor": 1.0},
    "yarn, a ratio of scales": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
}


def config_of(kind: str) -> Lfm2MoeConfig:
    return Lfm2MoeConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        layer_types=["conv", "full_attention"],
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_theta": 1e6, **KINDS[kind]},
    )


def settings(kind: str) -> dict[str, Any]:
    """The settings as our models hand them to an engine."""
    return Lfm2MoeArch.from_config(config_of(kind)).rope_parameters


def expected(kind: str) -> torch.Tensor:
    """(POSITIONS, HEAD_DIM): cosines of each position, then sines."""
    rotary = Lfm2MoeRotaryEmbedding(config_of(kind))
    cos, sin = rotary(torch.zeros(1, 1), torch.arange(POSITIONS)[None])
    half = HEAD_DIM // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)


def errors(table_of: Any) -> dict[str, float]:
    """The largest error of each kind; ``table_of(settings)`` is an engine's table of the shape above, or longer."""
    return {
        kind: (table_of(settings(kind)).float()[:POSITIONS] - expected(kind)).abs().max().item()
        for kind in KINDS
    }
