"""Adapters that PEFT wrote: our parts, added to the weights, are the model that PEFT merges."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import AdapterError, Target, adapter_scaling, read_adapter
from tests.tiny import make_model

MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# Names in transformers of what a target's module and shard say.
PLACES = {
    **{("self_attn.qkv_proj", shard): f"self_attn.{shard}_proj" for shard in "qkv"},
    ("feed_forward.w13", 0): "feed_forward.w1",
    ("feed_forward.w13", 1): "feed_forward.w3",
    ("feed_forward.experts", "w13"): "feed_forward.experts.gate_up_proj",
    ("feed_forward.experts", "w2"): "feed_forward.experts.down_proj",
}


def trained(folder: Path, modules: list[str], parameters: list[str], **options) -> tuple:
    """An adapter on a random model, saved: (arch, its config, its tensors, the model's weights, the merged ones)."""
    from peft import LoraConfig, get_peft_model

    model = make_model()
    arch = Lfm2MoeArch.from_config(model.config)
    plain = {name: weight.clone() for name, weight in model.state_dict().items()}
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=modules, target_parameters=parameters, **options
    )
    peft = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, weight in peft.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator)
    peft.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    return arch, settings, tensors, plain, peft.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    ("modules", "parameters", "options"),
    [
        (MODULES, EXPERTS, {}),
        ([], EXPERTS, {}),
        ([], EXPERTS[:1], {}),
        ([], EXPERTS[1:], {}),
        (MODULES, [], {"use_rslora": True}),
        (["k_proj", "w3"], [], {}),
    ],
    ids=["all", "experts", "up", "down", "rslora", "some"],
)
def test_parts_are_what_peft_merges(tmp_path, modules, parameters, options):
    arch, settings, tensors, weights, merged = trained(tmp_path, modules, parameters, **options)
    scaling = adapter_scaling(settings)
    parts = read_adapter(arch, settings["r"], tensors)
    assert len(parts) * 2 == len(tensors)
    for part in parts:
        target = part.target
        place = PLACES.get((target.module, target.shard), target.module)
        stacked = target.module == "feed_forward.experts"
        name = f"model.layers.{target.layer}.{place}" + ("" if stacked else ".weight")
        weights[name] = weights[name] + scaling * part.b @ part.a
    assert weights.keys() == merged.keys()
    for name, expected in merged.items():
        torch.testing.assert_close(weights[name], expected, msg=name)


def test_experts_one_by_one():
    """The form that PEFT gave before transformers stacked the experts."""
    arch = Lfm2MoeArch.from_config(make_model().config)
    place = "base_model.model.model.layers.5.feed_forward.experts.3.w2"
    a, b = torch.zeros(4, arch.moe_intermediate_size), torch.zeros(arch.hidden_size, 4)
    (part,) = read_adapter(arch, 4, {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b})
    assert part.target == Target(5, "feed_forward.experts", "weight", "w2", 3)
    assert part.a is a
    assert part.b is b


def factors(module: str, a: tuple[int, ...] = (4, 128), b: tuple[int, ...] = (128, 4)) -> dict:
    prefix = f"base_model.model.{module}.lora_"
    return {f"{prefix}A.weight": torch.zeros(a), f"{prefix}B.weight": torch.zeros(b)}


REFUSED = {
    "convolution": (
        factors("model.layers.0.conv.conv"),
        "can't be adapted: model.layers.0.conv.conv",
    ),
    "router": (factors("model.layers.5.feed_forward.gate"), "can't be adapted"),
    "norm": (factors("model.layers.5.ffn_norm"), "can't be adapted"),
    "head": (factors("lm_head"), "can't be adapted: lm_head"),
    "embedding": (
        {
            f"base_model.model.model.embed_tokens.lora_embedding_{side}": torch.zeros(4, 4)
            for side in "AB"
        },
        "can't be adapted: model.embed_tokens",
    ),
    "absent layer": (factors("model.layers.90.conv.out_proj"), "can't be adapted"),
    "layer of the other kind": (factors("model.layers.0.self_attn.out_proj"), "can't be adapted"),
    "experts in a dense layer": (
        factors("model.layers.0.feed_forward.experts", (32, 128), (128, 32)),
        "fit neither stack",
    ),
    "other rank": (
        factors("model.layers.0.conv.out_proj", (8, 128), (128, 8)),
        r"are \(8, 128\) and \(128, 8\), for this model they must be \(4, 128\) and \(128, 4\)",
    ),
    "other model": (factors("model.layers.0.conv.in_proj"), "another model"),
    "other experts": (factors("model.layers.5.feed_forward.experts"), "fit neither stack"),
    "whole weight": ({"base_model.model.lm_head.weight": torch.zeros(1)}, "no LoRA factors"),
    "half": (
        {"base_model.model.model.layers.0.conv.out_proj.lora_A.weight": torch.zeros(4, 128)},
        "only one of the factors A and B of: model.layers.0.conv.out_proj",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_tensors(name):
    tensors, message = REFUSED[name]
    arch = Lfm2MoeArch.from_config(make_model().config)
    with pytest.raises(AdapterError, match=message):
        read_adapter(arch, 4, tensors)


def test_names_few_of_many():
    tensors = {f"model.layers.{layer}.x.weight": torch.zeros(1) for layer in range(40)}
    with pytest.raises(AdapterError, match=re.escape("and 34 more")):
        read_adapter(Lfm2MoeArch.from_config(make_model().config), 4, tensors)


PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", "rank_pattern": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "of type 'LOHA'"),
        ({"use_dora": True}, "trained with use_dora"),
        ({"rank_pattern": {"w1": 8}}, "trained with rank_pattern"),
        ({"alpha_pattern": {"w1": 8}, "bias": "all"}, "trained with alpha_pattern, bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*Merge it"),
    ],
    ids=["kind", "dora", "ranks", "two", "saved"],
)
def test_refuses_settings(change, message):
    assert adapter_scaling(PLAIN) == 1.5
    with pytest.raises(AdapterError, match=message):
        adapter_scaling({**PLAIN, **change})
