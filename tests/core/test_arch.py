from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import Lfm2MoeConfig

from lfm2_plugin.arch import Lfm2MoeArch, UnsupportedConfig


def published(**changes) -> dict:
    """LFM2-24B-A2B as its config.json has it."""
    layers = ["full_attention" if i % 4 == 2 else "conv" for i in range(40)]
    return {
        "model_type": "lfm2_moe",
        "hidden_size": 2048,
        "intermediate_size": 11776,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 40,
        "layer_types": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "num_dense_layers": 2,
        "vocab_size": 65536,
        "conv_L_cache": 3,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        **changes,
    }


def without(name: str, **changes) -> dict:
    config = published(**changes)
    del config[name]
    return config


def test_published_shape() -> None:
    arch = Lfm2MoeArch.from_config(published())
    assert (arch.hidden_size, arch.head_dim, arch.num_experts) == (2048, 64, 64)
    assert len(arch.conv_layers) == 30
    assert arch.attention_layers == tuple(range(2, 40, 4))
    assert arch.moe_layers == tuple(range(2, 40))
    assert arch.state_len == 2
    assert arch.tie_word_embeddings
    # The figures of the memory table: 240 KiB of conv state a sequence, 20 KiB of keys and values a token.
    assert arch.conv_state_bytes(torch.bfloat16) == 245_760
    assert arch.kv_bytes_per_token(torch.bfloat16) == 20 * 1024
    assert arch.conv_state_bytes(torch.float32) == 2 * 245_760


def test_mapping_object_and_file_agree() -> None:
    config = Lfm2MoeConfig(**without("model_type"))
    from_object = Lfm2MoeArch.from_config(config)
    assert from_object == Lfm2MoeArch.from_config(json.loads(config.to_json_string()))
    assert from_object == Lfm2MoeArch.from_config(published())


@pytest.mark.parametrize(
    ("config", "theta"),
    [
        (published(rope_parameters={"rope_theta": 5e6, "rope_type": "default"}), 5e6),
        (without("rope_parameters", rope_theta=2e6), 2e6),
        (published(rope_parameters={"rope_theta": 5e6}, rope_theta=1e6), 5e6),
        (published(rope_parameters=None, rope_theta=3e6), 3e6),
        (without("rope_parameters"), 1e6),
    ],
    ids=["nested", "flat", "nested-wins", "null", "default"],
)
def test_rope_forms(config: dict, theta: float) -> None:
    arch = Lfm2MoeArch.from_config(config)
    assert arch.rope_theta == theta
    assert arch.rope_parameters == {"rope_type": "default", "rope_theta": theta}


def test_rope_scaling_is_kept() -> None:
    scaled = {"type": "linear", "factor": 2.0}
    arch = Lfm2MoeArch.from_config(without("rope_parameters", rope_scaling=scaled, rope_theta=1e4))
    assert arch.rope_parameters == {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


def test_head_dim_of_the_config_wins() -> None:
    assert Lfm2MoeArch.from_config(published(head_dim=128)).head_dim == 128
    assert Lfm2MoeArch.from_config(published(head_dim=None)).head_dim == 64


@pytest.mark.parametrize("name", ["tie_embedding", "tie_word_embeddings"])
def test_untied(name: str) -> None:
    assert not Lfm2MoeArch.from_config(published(**{name: False})).tie_word_embeddings


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (published(model_type="llama"), "model_type 'llama'"),
        ({}, "model_type None"),
        (without("layer_types"), "lacks layer_types"),
        (without("num_experts", vocab_size=None), "lacks num_experts, vocab_size"),
        (published(num_hidden_layers=39), "40 entries for num_hidden_layers 39"),
        (published(layer_types=["conv", "mamba"] * 20), "layer_types has mamba"),
        (published(num_key_value_heads=5), "32 is no multiple of num_key_value_heads 5"),
        (published(num_attention_heads=24), "2048 is no multiple of num_attention_heads 24"),
        (published(head_dim=63), "odd"),
        (published(num_experts_per_tok=65), "65 is more than num_experts 64"),
        (published(conv_L_cache=9), "conv_L_cache 9 is outside 2..8"),
        (published(conv_L_cache=1), "conv_L_cache 1 is outside 2..8"),
        (published(num_dense_layers=41), "num_dense_layers 41 is more"),
        (published(num_dense_layers=-1), "num_dense_layers is -1"),
        (published(hidden_size="2048"), "hidden_size is '2048', not a positive integer"),
        (published(num_experts=0), "num_experts is 0"),
        (published(num_experts=64.0), "num_experts is 64.0, not a positive integer"),
        (published(num_hidden_layers=True), "num_hidden_layers is True"),
        (published(num_dense_layers=True), "num_dense_layers is True"),
        (published(head_dim=[64]), "head_dim is "),
        (published(layer_types="conv"), "layer_types is 'conv', not a list of strings"),
        (published(layer_types=[["conv"]] * 40), "not a list of strings"),
        (published(layer_types=4), "layer_types is 4"),
        (published(norm_eps=0), "norm_eps is 0, not a number above 0"),
        (published(norm_eps=float("nan")), "norm_eps is nan"),
        (published(norm_eps="1e-5"), "norm_eps is '1e-5'"),
        (published(norm_eps=True), "norm_eps is True"),
        (published(routed_scaling_factor=[2.5]), "routed_scaling_factor is "),
        (published(routed_scaling_factor=0.0), "routed_scaling_factor is 0.0"),
        (published(conv_bias="false"), "conv_bias is 'false', not true or false"),
        (published(norm_topk_prob=1), "norm_topk_prob is 1"),
        (published(use_expert_bias=[]), "use_expert_bias is "),
        (published(tie_embedding="no"), "tie_embedding is 'no'"),
    ],
)
def test_refused(config: dict, message: str) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        Lfm2MoeArch.from_config(config)


def test_everything_wrong_is_listed() -> None:
    with pytest.raises(UnsupportedConfig, match=r"(?s)num_hidden_layers 39.*conv_L_cache 12"):
        Lfm2MoeArch.from_config(published(num_hidden_layers=39, conv_L_cache=12))


def test_problems_of_every_kind_are_listed_together() -> None:
    config = without(
        "vocab_size", num_experts="8", norm_eps=-1, conv_bias=2, rope_theta=1, sliding_window=256
    )
    config["rope_parameters"] = {"rope_theta": 0}
    with pytest.raises(UnsupportedConfig) as refused:
        Lfm2MoeArch.from_config(config)
    for word in (
        "lacks vocab_size",
        "num_experts is '8'",
        "norm_eps is -1",
        "conv_bias is 2",
        "rope_theta is 0",
        "sliding_window is 256",
    ):
        assert word in str(refused.value)


@pytest.mark.parametrize("given", [SimpleNamespace(), [published()], None, "config.json", 7])
def test_something_else_entirely(given) -> None:
    with pytest.raises(UnsupportedConfig, match=f"got {type(given).__name__}"):
        Lfm2MoeArch.from_config(given)


def test_layer_types_as_transformers_renames_them():
    """transformers from 5.17 on hands the engine a config with other names than the file has."""
    renamed = {"conv": "linear_attention", "full_attention": "full_attention"}
    given = published()
    arch = Lfm2MoeArch.from_config(given)
    other = given | {"layer_types": [renamed[kind] for kind in given["layer_types"]]}
    assert Lfm2MoeArch.from_config(other) == arch
    assert arch.conv_layers
