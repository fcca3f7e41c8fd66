"""The model configurations that are measured, written as folders that an engine can open.

Published shapes (``24b``, ``8b``, ``2.5-8b``) are those of the released checkpoints; ``*-cut``
keeps every width and cuts the depth, so that a layer costs what it costs in the real model while
the whole fits in a small machine. Weights are random: speed and memory depend on shapes, not on
values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "architectures": ["Lfm2MoeForCausalLM"],
    "model_type": "lfm2_moe",
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "norm_eps": 1e-5,
    "conv_L_cache": 3,
    "conv_bias": False,
    "num_dense_layers": 2,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "use_expert_bias": True,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 128000,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "pad_token_id": 0,
    "vocab_size": 65536,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
_8B: dict[str, Any] = {"num_experts": 32, "moe_intermediate_size": 1792, "intermediate_size": 7168}
_24B: dict[str, Any] = {
    "num_experts": 64,
    "moe_intermediate_size": 1536,
    "intermediate_size": 11776,
}
_ATTENTION_8B = (2, 6, 10, 14, 18, 21)
_ATTENTION_24B = tuple(range(2, 40, 4))


def _layers(count: int, attention: tuple[int, ...]) -> dict[str, Any]:
    """The two config entries for ``count`` layers of which ``attention`` hold attention."""
    kinds = ["full_attention" if i in attention else "conv" for i in range(count)]
    return {"num_hidden_layers": count, "layer_types": kinds}


MODELS: dict[str, dict[str, Any]] = {
    "24b": _COMMON | _24B | _layers(40, _ATTENTION_24B),
    "8b": _COMMON | _8B | _layers(24, _ATTENTION_8B),
    "2.5-8b": _COMMON
    | _8B
    | _layers(24, _ATTENTION_8B)
    | {
        "vocab_size": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0},
    },
    "24b-cut": _COMMON | _24B | _layers(6, (2,)),
    "8b-cut": _COMMON | _8B | _layers(8, (2, 6)),
    "small": _COMMON
    | _layers(8, (2, 6))
    | {
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_experts": 16,
        "moe_intermediate_size": 448,
        "intermediate_size": 1792,
        "vocab_size": 8192,
        "max_position_embeddings": 8192,
    },
}

RIVALS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "dtype": "bfloat16",
        "hidden_size": 2880,
        "num_hidden_layers": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "sliding_window": 128,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "hidden_act": "silu",
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
        "eos_token_id": 200002,
        "pad_token_id": 199999,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    },
}
"""The models that LFM2-24B-A2B was released beside, by their published configs; engines serve them built-in."""

DEMO = Path(__file__).resolve().parents[1] / "lfm2_plugin" / "demo"


def config_of(name: str) -> dict[str, Any]:
    """The ``config.json`` of a named model.

    Raises:
        ValueError: there is no model of that name.

    """
    named = MODELS | RIVALS
    if name not in named:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(sorted(named))}, demo")
    return named[name]


def model_folder(name: str, cache: Path) -> tuple[Path, bool]:
    """A folder that an engine can open, and whether it holds real weights.

    Args:
        name: a key of :data:`MODELS` or :data:`RIVALS`, ``demo``, or the path of a checkpoint.
        cache: where the folders without weights are written.

    Raises:
        ValueError: no such model, or the demo checkpoint has not been built.

    """
    if name == "demo":
        found = sorted(DEMO.glob("**/model.safetensors"))
        if not found:
            raise ValueError(f"no demo checkpoint under {DEMO}: train it first (examples/)")
        return found[0].parent, True
    path = Path(name)
    if name not in MODELS | RIVALS and (path / "config.json").is_file():
        return path, any(path.glob("*.safetensors"))
    folder = cache / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(name), indent=1))
    return folder, False
