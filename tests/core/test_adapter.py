"""Adapters that PEFT wrote: our parts, added to the weights, are the model that PEFT merges."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import (
    ADAPTABLE,
    AdapterConfig,
    AdapterError,
    read_adapter,
    read_adapter_config,
    read_adapter_tensors,
    unified,
)
from tests.engine_common.adapters import unstacked
from tests.tiny import make_model

MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
EVERYWHERE = ADAPTABLE | {"feed_forward.gate", "embed_tokens", "lm_head"}
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", "rank_pattern": {}}
CONFIG = AdapterConfig(rank=4, alpha=6)
# Names in transformers of what a target's module and shard say.
PLACES = {
    **{("self_attn.qkv_proj", shard): f"self_attn.{shard}_proj" for shard in "qkv"},
    ("feed_forward.w13", 0): "feed_forward.w1",
    ("feed_forward.w13", 1): "feed_forward.w3",
}


def trained(folder: Path, modules, parameters: list[str], shape: dict | None = None, **options):
    """An adapter on a random model, saved: (arch, its config, its tensors, the model's weights, the merged ones)."""
    from peft import LoraConfig, get_peft_model

    model = make_model(**shape or {})
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


def added(arch: Lfm2MoeArch, weights: dict, config: AdapterConfig, tensors: dict) -> dict:
    """The weights with an adapter in its unified form added to them."""
    weights = {name: weight.clone() for name, weight in weights.items()}
    for part in unified(arch, config, read_adapter(arch, config, tensors, EVERYWHERE)):
        assert part.scaling == 1
        assert part.a.shape[-2] == part.b.shape[-1] == config.largest_rank
        target, change = part.target, part.b @ part.a
        if target.module == "feed_forward.experts":
            stack = "down_proj" if target.shard == "w2" else "gate_up_proj"
            weight = weights[f"model.layers.{target.layer}.feed_forward.experts.{stack}"]
            width = arch.moe_intermediate_size
            rows = {"w1": slice(width), "w3": slice(width, None)}.get(target.shard, slice(None))
            weight[:, rows] += change
            continue
        place = PLACES.get((target.module, target.shard), target.module)
        name = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}.get(
            place, f"model.layers.{target.layer}.{place}"
        )
        weights[f"{name}.weight"] += change.T if place == "embed_tokens" else change
    return weights


def assert_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, msg=name)


UNTIED = {"tie_word_embeddings": False}
RANKS = {"rank_pattern": {"q_proj": 2, "experts.down_proj": 8, "layers.3.conv.in_proj": 1}}
ALPHAS = {"alpha_pattern": {"q_proj": 3, "experts.gate_up_proj": 16, "w.": 2}}


@pytest.mark.parametrize(
    ("modules", "parameters", "options"),
    [
        (MODULES, EXPERTS, {}),
        ([], EXPERTS, {}),
        ([], EXPERTS[:1], {}),
        ([], EXPERTS[1:], {}),
        (MODULES, [], {"use_rslora": True}),
        (["k_proj", "w3"], [], {}),
        (MODULES, EXPERTS, RANKS),
        (MODULES, EXPERTS, ALPHAS),
        (MODULES, EXPERTS, {**RANKS, **ALPHAS, "use_rslora": True}),
        ([], ["feed_forward.gate.weight"], {}),
        (["lm_head", "embed_tokens"], [], {"shape": UNTIED}),
    ],
    ids=[
        "all",
        "experts",
        "up",
        "down",
        "rslora",
        "some",
        "ranks",
        "alphas",
        "ranks and alphas",
        "router",
        "embedding and head",
    ],
)
def test_parts_are_what_peft_merges(tmp_path, modules, parameters, options):
    arch, settings, tensors, weights, merged = trained(tmp_path, modules, parameters, **options)
    assert_close(added(arch, weights, AdapterConfig.from_dict(settings), tensors), merged)


@pytest.mark.parametrize("left_out", [(), (0, 5)], ids=["all", "some"])
def test_experts_one_by_one(tmp_path, left_out):
    """The form that PEFT gave before transformers stacked the experts; those without factors stay as they are."""
    arch, settings, tensors, weights, merged = trained(tmp_path, [], EXPERTS)
    config = AdapterConfig.from_dict(settings)
    apart = unstacked(tensors, arch.num_experts, 4, left_out)
    assert len(apart) == (8 - len(left_out)) * 3 * 2 * 6
    for name, weight in weights.items():
        if ".experts." in name:
            merged[name][list(left_out)] = weight[list(left_out)]
    assert_close(added(arch, weights, config, apart), merged)


def test_stacks_grouped_by_expert(tmp_path):
    """Unsloth's own order of the columns of B, named in the config."""
    arch, settings, tensors, weights, merged = trained(tmp_path, [], EXPERTS)
    grouped = {
        name: tensor.unflatten(1, (4, arch.num_experts)).transpose(1, 2).flatten(1)
        if ".lora_B." in name
        else tensor
        for name, tensor in tensors.items()
    }
    config = AdapterConfig.from_dict({**settings, "lora_B_layout": "grouped_by_expert"})
    assert_close(added(arch, weights, config, grouped), merged)


@pytest.mark.parametrize("width", [32, 64], ids=["shapes tell", "square"])
def test_stacks_of_an_older_peft(tmp_path, width):
    """Before 0.19 PEFT took a stack's outputs for its inputs: A is the B of the transposed stack."""
    shape = {"moe_intermediate_size": width}
    arch, settings, tensors, weights, merged = trained(tmp_path, [], EXPERTS, shape)
    experts, swapped = arch.num_experts, {}
    for name in tensors:
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            a, b = tensors[name], tensors[other]
            swapped[name] = b.unflatten(1, (4, experts)).permute(2, 1, 0).flatten(0, 1)
            swapped[other] = a.unflatten(0, (experts, 4)).permute(2, 1, 0).flatten(1)
    config = AdapterConfig.from_dict({**settings, "peft_version": "0.18.1"})
    assert_close(added(arch, weights, config, swapped), merged)


def factors(module: str, a: tuple[int, ...] = (4, 128), b: tuple[int, ...] = (128, 4)) -> dict:
    prefix = f"base_model.model.{module}.lora_"
    return {f"{prefix}A.weight": torch.zeros(a), f"{prefix}B.weight": torch.zeros(b)}


FINE = "model.layers.0.conv.out_proj"
ONE = "model.layers.5.feed_forward.experts.3.w2"
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
    "absent expert": (
        factors("model.layers.5.feed_forward.experts.8.w2", (4, 64)),
        "can't be adapted: model.layers.5.feed_forward.experts.8.w2",
    ),
    "layer of the other kind": (factors("model.layers.0.self_attn.out_proj"), "can't be adapted"),
    "experts in a dense layer": (
        factors("model.layers.0.feed_forward.experts", (32, 128), (128, 32)),
        "fit neither stack",
    ),
    "other rank": (
        factors(FINE, (8, 128), (128, 8)),
        r"are \(8, 128\) and \(128, 8\), for this model they must be \(4, 128\) and \(128, 4\)",
    ),
    "other model": (factors("model.layers.0.conv.in_proj"), "another model"),
    "other experts": (factors("model.layers.5.feed_forward.experts"), "fit neither stack"),
    "whole weight": ({"base_model.model.lm_head.weight": torch.zeros(1)}, "no LoRA factors"),
    "magnitudes of DoRA": (
        {**factors(FINE), f"base_model.model.{FINE}.lora_magnitude_vector": torch.zeros(128)},
        "no LoRA factors: base_model.model.model.layers.0.conv.out_proj.lora_magnitude_vector",
    ),
    "half": (
        {f"base_model.model.{FINE}.lora_A.weight": torch.zeros(4, 128)},
        f"only one of the factors A and B of: {FINE}",
    ),
    "two names": (
        {**factors(FINE), f"{FINE}.lora_A.weight": torch.zeros(4, 128)},
        "factors under two names",
    ),
    "integers": (
        {name: tensor.long() for name, tensor in factors(FINE).items()},
        r"neither float32 nor float16 nor bfloat16: .*conv.out_proj.lora_A.weight \(torch.int64\)",
    ),
    "an expert twice": (
        {
            **factors(ONE, (4, 64)),
            **factors("model.layers.5.feed_forward.experts", (32, 64), (128, 32)),
        },
        "matrices twice: w2 in layer 5",
    ),
    "nothing": ({}, "no LoRA factors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_tensors(name):
    tensors, message = REFUSED[name]
    arch = Lfm2MoeArch.from_config(make_model().config)
    with pytest.raises(AdapterError, match=message):
        read_adapter(arch, CONFIG, tensors)


def test_names_few_of_many():
    tensors = {f"model.layers.{layer}.x.weight": torch.zeros(1) for layer in range(40)}
    with pytest.raises(AdapterError, match=re.escape("and 34 more")):
        read_adapter(Lfm2MoeArch.from_config(make_model().config), CONFIG, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "of type 'LOHA'"),
        ({"peft_type": None}, "of type 'NONE'"),
        ({"use_dora": True}, "trained with use_dora"),
        ({"alora_invocation_tokens": [5, 7]}, "trained with alora_invocation_tokens"),
        ({"use_qalora": True, "bias": "all"}, "trained with bias, use_qalora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*Merge it"),
        ({"init_lora_weights": "pissa_niter_4"}, "trained with init_lora_weights=pissa_niter_4"),
        ({"r": None}, "r is None and must be a whole number from 1 to 1024"),
        ({"r": 0}, "r is 0 and must be"),
        ({"r": -4}, "r is -4 and must be"),
        ({"r": 4.5}, "r is 4.5 and must be"),
        ({"r": "4"}, "r is '4' and must be"),
        ({"r": True}, "r is True and must be"),
        ({"lora_alpha": None}, "lora_alpha is None and must be a number"),
        ({"lora_alpha": "6"}, "lora_alpha is '6' and must be a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan and must be a number"),
        ({"r": 0, "lora_alpha": []}, r"r is 0 .*, lora_alpha is \[\]"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes' and must be true or false"),
        ({"rank_pattern": {"w1": 0}}, "rank_pattern is .* and must be module names with ranks"),
        ({"rank_pattern": ["w1"]}, "rank_pattern is"),
        ({"alpha_pattern": {"w1": "8"}}, "alpha_pattern is"),
        ({"alpha_pattern": {"w(": 8}}, "alpha_pattern is"),
        ({"lora_B_layout": "other"}, "lora_B_layout is 'other' and must be rank_major or"),
    ],
)
def test_refuses_settings(change, message):
    assert AdapterConfig.from_dict(PLAIN).of("any") == (4, 1.5)
    with pytest.raises(AdapterError, match=message):
        AdapterConfig.from_dict({**PLAIN, **change})


def test_settings_left_out():
    for name in ("r", "lora_alpha", "peft_type"):
        with pytest.raises(AdapterError):
            AdapterConfig.from_dict({key: value for key, value in PLAIN.items() if key != name})


def test_the_first_pattern_counts():
    """As in PEFT: a pattern is a regular expression for the end of a name, after a dot."""
    settings = {**PLAIN, "rank_pattern": {"layers.1.*.w1": 2, "w1": 8, "proj": 3}}
    config = AdapterConfig.from_dict(settings)
    assert config.largest_rank == 8
    assert config.of("model.layers.1.feed_forward.w1") == (2, 3.0)
    assert config.of("model.layers.2.feed_forward.w1") == (8, 0.75)
    assert config.of("model.layers.2.self_attn.q_proj") == (4, 1.5)


def test_a_folder(tmp_path):
    with pytest.raises(AdapterError, match=r"There is no folder: .*absent"):
        read_adapter_config(tmp_path / "absent")
    with pytest.raises(AdapterError, match=r"There is no adapter_config.json: "):
        read_adapter_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"adapter_config.json can't be read: "):
        read_adapter_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="has list, not settings"):
        read_adapter_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    assert read_adapter_config(tmp_path) == AdapterConfig(rank=4, alpha=6)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_the_file_of_tensors(tmp_path, suffix):
    with pytest.raises(AdapterError, match=r"There is no adapter_model.safetensors in "):
        read_adapter_tensors(tmp_path)
    tensors, path = factors(FINE), tmp_path / f"adapter_model.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(tensors, path)
    found = read_adapter_tensors(tmp_path)
    assert found.keys() == tensors.keys()
    for damaged in (path.read_bytes()[:-100], b"", b"\0" * 100):
        path.unlink()
        path.write_bytes(damaged)
        with pytest.raises(AdapterError, match=rf"adapter_model.{suffix} is damaged: "):
            read_adapter_tensors(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_no_numbers(value, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in factors(FINE).items()}
    arch = Lfm2MoeArch.from_config(make_model().config)
    read_adapter(arch, CONFIG, tensors)
    name = sorted(tensors)[1]
    tensors[name].view(-1)[-1] = value
    with pytest.raises(AdapterError, match=rf"has NaN or infinity in: {re.escape(name)}\. "):
        read_adapter(arch, CONFIG, tensors)
