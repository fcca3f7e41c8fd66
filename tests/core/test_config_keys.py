"""Entries of a config.json that nothing reads: harmless ones are let be, others are refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import Lfm2MoeConfig

from lfm2_plugin.arch import Lfm2MoeArch, UnsupportedConfig

from .test_arch import published

# What else than the shape has been seen in configs of this family, by the libraries that wrote them.
WRITTEN = {
    "transformers 4": {
        "architectures": ["Lfm2MoeForCausalLM"],
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 7,
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "tie_embedding": True,
        "transformers_version": "4.56.1",
        "use_cache": True,
    },
    "transformers 5": {
        "chunk_size_feed_forward": 0,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "is_encoder_decoder": False,
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "output_hidden_states": False,
        "output_router_logits": False,
        "problem_type": None,
        "return_dict": True,
    },
    "LFM2's first configs": {
        "block_auto_adjust_ff_dim": True,
        "block_dim": 2048,
        "block_ff_dim": 12288,
        "block_ffn_dim_multiplier": 1.0,
        "block_mlp_init_scale": 1.0,
        "block_multiple_of": 256,
        "block_norm_eps": 1e-5,
        "block_out_init_scale": 1.0,
        "block_use_swiglu": True,
        "block_use_xavier_init": True,
        "conv_dim": 2048,
        "conv_dim_out": 2048,
        "conv_use_xavier_init": True,
        "full_attn_idxs": list(range(2, 40, 4)),
        "num_heads": 32,
        "rope_theta": 1e6,
        "theta": 1e6,
        "torch_dtype": "bfloat16",
        "use_pos_enc": True,
    },
    "other tools": {
        "_comment": "merged by hand",
        "_name_or_path": "LiquidAI/LFM2-24B-A2B",
        "auto_map": {"AutoConfig": "configuration.Config"},
        "quantization": {"bits": 4},
        "quantization_config": {"quant_method": "fp8"},
        "temperature": 0.3,
        "unsloth_version": "2026.1",
    },
    "what LFM2-MoE does anyway": {
        "attention_bias": False,
        "attention_dropout": 0.1,
        "final_logit_softcapping": None,
        "hidden_act": "silu",
        "is_causal": True,
        "logit_scale": 1.0,
        "mlp_bias": False,
        "n_group": 1,
        "n_shared_experts": 0,
        "partial_rotary_factor": 1.0,
        "pruned_heads": {},
        "scoring_func": "sigmoid",
        "sliding_window": None,
        "topk_group": 1,
    },
}
CHANGES: dict[str, Any] = {
    "attention_bias": True,
    "block_use_swiglu": False,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu",
    "is_causal": False,
    "logit_scale": 0.5,
    "n_group": 8,
    "n_shared_experts": 1,
    "partial_rotary_factor": 0.5,
    "per_layer_config": {"3": {"num_experts_per_tok": 2}},
    "scoring_func": "softmax",
    "sliding_window": 256,
    "some_entry_of_next_year": "on",
    "use_qk_norm": False,
}
CONTRADICTIONS = {"num_heads": 16, "conv_dim_out": 4096, "block_norm_eps": 1e-6, "v_head_dim": 128}


@pytest.mark.parametrize("who", WRITTEN)
def test_what_is_harmless_is_let_be(who: str) -> None:
    changed = published(**WRITTEN[who])
    assert Lfm2MoeArch.from_config(changed) == Lfm2MoeArch.from_config(published())


@pytest.mark.parametrize("name", CHANGES)
def test_what_may_change_the_model_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedConfig, match=f"{name} is ") as refused:
        Lfm2MoeArch.from_config(published(**{name: CHANGES[name]}))
    assert "--hf-overrides" in str(refused.value)


@pytest.mark.parametrize("name", CHANGES)
def test_and_so_it_is_where_transformers_read_the_file(name: str) -> None:
    given = published(**{name: CHANGES[name]})
    given.pop("model_type")
    with pytest.raises(UnsupportedConfig, match=f"{name} is |rotary settings have {name} "):
        Lfm2MoeArch.from_config(Lfm2MoeConfig(**given))


def test_null_is_the_way_out() -> None:
    changed = published(**dict.fromkeys(CHANGES))
    assert Lfm2MoeArch.from_config(changed) == Lfm2MoeArch.from_config(published())


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_second_name_has_to_agree(name: str) -> None:
    with pytest.raises(UnsupportedConfig, match=f"{name} is .* where "):
        Lfm2MoeArch.from_config(published(**{name: CONTRADICTIONS[name]}))


def test_the_indices_of_attention_have_to_agree() -> None:
    with pytest.raises(UnsupportedConfig, match="full_attn_idxs"):
        Lfm2MoeArch.from_config(published(full_attn_idxs=[0, 1]))


def test_a_long_entry_is_cut_short() -> None:
    with pytest.raises(UnsupportedConfig) as refused:
        Lfm2MoeArch.from_config(published(notes=list(range(1000))))
    assert len(str(refused.value)) < 600


def test_what_a_later_transformers_fills_in_by_itself_is_no_entry_of_the_file() -> None:
    class Later(Lfm2MoeConfig):
        router_scale: float = 1.5

    given = published()
    given.pop("model_type")
    assert Later(**given).to_dict()["router_scale"] == 1.5
    assert Lfm2MoeArch.from_config(Later(**given)) == Lfm2MoeArch.from_config(published())
    with pytest.raises(UnsupportedConfig, match="router_scale is 2"):
        Lfm2MoeArch.from_config(Later(**given, router_scale=2.0))


def test_every_entry_of_a_fresh_config_is_known() -> None:
    """Of the class itself, and of what it writes to a file."""
    given = published()
    given.pop("model_type")
    config = Lfm2MoeConfig(**given)
    written = json.loads(config.to_json_string(use_diff=False))
    assert Lfm2MoeArch.from_config(written) == Lfm2MoeArch.from_config(published())
