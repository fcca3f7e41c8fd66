"""Quantised checkpoints: the config's lists mean the modules that the tools mean by them."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM
from transformers.quantizers.quantizers_utils import should_convert_module

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import names
from lfm2_plugin.checkpoint.quantisation import (
    PLAIN,
    QuantisationPlan,
    UnsupportedQuantisation,
    modules_by_engine_name,
    read_plan,
    read_quantisation_config,
)
from tests.tiny import make_config

# Twelve layers, so that one layer's number begins another's; attention in three, experts from the third on.
LAYERS = 12
CONFIG = make_config(
    num_hidden_layers=LAYERS,
    num_experts=4,
    layer_types=["full_attention" if i % 4 == 1 else "conv" for i in range(LAYERS)],
    num_dense_layers=2,
    tie_word_embeddings=False,
).to_dict()
ARCH = Lfm2MoeArch.from_config(CONFIG)
HUB = sorted(
    name.removesuffix(".weight")
    for name in names.expected_tensors(ARCH)
    if names.is_quantisable(name) and name.endswith(".weight")
)
ROUTERS = {name for name in HUB if name.endswith(".feed_forward.gate")}
SPELLED = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def by_llm_compressor(name: str) -> str:
    """A module's name as llm-compressor spells it."""
    head, _, tail = name.rpartition(".")
    return f"{head}.{SPELLED[tail]}" if ".experts." in name else name


LINEARS = [by_llm_compressor(name) for name in HUB]


def int4(group: int, *targets: str, **more) -> dict:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    return {"targets": list(targets), "weights": {**weights, "group_size": group, **more}}


def compressed(*groups: dict, ignore=(), form: str = "pack-quantized") -> dict:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": list(ignore),
    }


def entries(rng: random.Random, modules: list[str], count: int) -> list[str]:
    """Entries as people and tools write them: names, ends of names, classes, regular expressions of all kinds."""
    found = []
    for _ in range(count):
        name = rng.choice(modules)
        last = name.rpartition(".")[2]
        layer = rng.randrange(LAYERS)
        found.append(
            rng.choice(
                [
                    name,
                    name.rpartition(".")[0],
                    last,
                    rng.choice(["Linear", "Module", "Conv1d", "Lfm2MoeTopKRouter", "lm_head"]),
                    f"re:.*{last}",
                    f"re:.*{last}$",
                    f"re:{last}",
                    f"re:.*\\.{layer}\\..*",
                    f"re:.*layers.{layer}.*",
                    f"re:model\\.layers\\.(?!{layer}\\.).*_proj$",
                    r"re:.*\.conv\.(in|out)_proj$",
                    "re:.*experts.*",
                    "re:.*gate$",
                    "re:.*gate",
                    "re:.*",
                ]
            )
        )
    return found


@pytest.fixture(scope="module")
def hf_model():
    """The Hugging Face model as llm-compressor quantises it: each expert three Linears; no memory behind it."""
    with torch.device("meta"):
        model = Lfm2MoeForCausalLM(Lfm2MoeConfig(**CONFIG))
        for layer in model.model.layers[ARCH.num_dense_layers :]:
            experts = torch.nn.ModuleList()
            for _ in range(ARCH.num_experts):
                experts.append(torch.nn.Module())
                for name in SPELLED.values():
                    experts[-1].add_module(name, torch.nn.Linear(2, 2))
            layer.feed_forward.experts = experts
    return model


def test_the_same_modules_as_compressed_tensors_own_matcher(hf_model):
    match = pytest.importorskip("compressed_tensors.utils.match")
    modules = dict(hf_model.named_modules())
    assert set(LINEARS) <= set(modules)
    rng = random.Random(0)
    quantised = 0
    for _ in range(150):
        groups = [int4(16 << i, *entries(rng, LINEARS, rng.randint(1, 2))) for i in range(3)]
        ignore = entries(rng, LINEARS, rng.randint(0, 4))
        schemes = {target: group for group in groups for target in group["targets"]}
        expected = {
            name: schemes[match.match_targets(name, module, schemes)[0]]["weights"]["group_size"]
            for name, module in match.match_named_modules(hf_model, schemes, ignore)
            if name in LINEARS
        }
        plan = read_plan(compressed(*groups, ignore=ignore), LINEARS)
        found = {
            name: int(plan.of(name).name.rpartition(" g")[2]) for name in plan.quantised_modules
        }
        assert found == expected, (groups, ignore)
        quantised += 0 < len(expected) < len(LINEARS)
    assert quantised > 50  # cases that tell modules apart


def test_fp8_lists_mean_what_transformers_means_by_them():
    rng = random.Random(1)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    linear = [name for name in HUB if name not in ROUTERS and name != "lm_head"]
    for _ in range(100):
        listed = [entry for entry in entries(rng, HUB, 3) if not entry.startswith("re:")]
        plan = read_plan(config | {"modules_to_not_convert": listed}, HUB)
        converted = {name for name in linear if should_convert_module(name, listed)}
        assert plan.quantised_modules == converted, listed


def test_the_file_says_what_the_router_is():
    """transformers 4 has it as a Linear, transformers 5 has not: both wrote "Linear" as the only target."""
    gate = "model.layers.2.feed_forward.gate"
    config = compressed(int4(32, "Linear"))
    assert read_plan(config, LINEARS).of(gate) == PLAIN
    assert read_plan(config, LINEARS, [f"{gate}.weight"]).of(gate) == PLAIN
    found = read_plan(config, LINEARS, [f"{gate}.weight_packed", f"{gate}.weight_scale"])
    assert found.of(gate).name == "W4A16 int4 g32"
    ignoring = compressed(int4(32, "Linear"), ignore=[r"re:.*\.gate$"])
    assert read_plan(ignoring, LINEARS, [f"{gate}.weight_packed"]).of(gate) == PLAIN
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert read_plan(fp8, LINEARS, [f"{gate}.weight"]).of(gate) == PLAIN
    assert read_plan(fp8, LINEARS, [f"{gate}.weight_scale_inv"]).of(gate) != PLAIN


def test_names_are_matched_as_the_file_spells_them():
    config = compressed(int4(32, "Linear"), ignore=["re:.*gate_proj$", "lm_head"])
    assert read_plan(config, HUB).plain_modules == {"lm_head"} | ROUTERS
    plain = read_plan(config, LINEARS).plain_modules
    assert len(plain) == 1 + len(ROUTERS) * (1 + ARCH.num_experts)


def meaning(plan: QuantisationPlan) -> set[str]:
    """The plain modules, many of one kind as one pattern, the router left out."""
    return {re.sub(r"\d+", "*", name) for name in plan.plain_modules - ROUTERS}


@pytest.mark.parametrize(
    ("entry", "plain"),
    [
        ("lm_head", {"lm_head"}),
        ("*lm_head*", {"lm_head"}),
        (
            "*self_attn*",
            {f"model.layers.*.self_attn.{part}_proj" for part in ("q", "k", "v", "out")},
        ),
        ("in_proj", {"model.layers.*.conv.in_proj"}),
        ("gate", set()),  # not gate_proj
        ("model.layers.1", {f"model.layers.1.feed_forward.w{i}" for i in (1, 2, 3)}),
        ("model.layers.1.*", {f"model.layers.1.feed_forward.w{i}" for i in (1, 2, 3)}),
        ("conv*", {"model.layers.*.conv.in_proj", "model.layers.*.conv.out_proj"}),
        ("model.layers.10.feed_forward.experts", None),
        ("model.layers.10.feed_forward.experts*", None),
    ],
)
def test_modelopts_wildcards_and_the_short_names_of_its_older_releases(
    entry: str, plain: set | None
):
    nested = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": [entry]}}
    flat = {"quant_method": "modelopt", "quant_algo": "nvfp4", "ignore": [entry]}
    plan = read_plan(flat, LINEARS)
    assert read_plan(nested, LINEARS) == plan
    if plain is None:
        inside = {
            name for name in LINEARS if name.startswith("model.layers.10.feed_forward.experts.")
        }
        assert plan.plain_modules - ROUTERS == inside
    elif entry.startswith("model.layers.1"):
        inside = {name for name in LINEARS if name.startswith("model.layers.1.")}
        assert plan.plain_modules - ROUTERS == inside
        assert plain < inside
    else:
        assert meaning(plan) == plain


def test_modelopt_in_mixed_precision():
    experts = "model.layers.2.feed_forward.experts"
    config = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            experts: {"quant_algo": "NVFP4", "group_size": 16},
            f"{experts}.0.w2": {"quant_algo": "FP8"},
        },
    }
    plan = read_plan(config, HUB)
    assert plan.of(f"{experts}.1.w2").name == "W4A4 NVFP4"
    assert plan.of(f"{experts}.0.w2").name == "W8A8 fp8, static activations"
    assert {name.startswith(f"{experts}.") for name in plan.quantised_modules} == {True}


def test_awq():
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    listed = config | {"modules_to_not_convert": ["conv", "self_attn"]}
    plan = read_plan(listed, HUB)
    found = plan.of("model.layers.0.feed_forward.w1")
    assert (found.name, set(found.parameters)) == (
        "W4A16 AWQ g128",
        {"qweight", "qzeros", "scales"},
    )
    assert not {name for name in plan.quantised_modules if "conv" in name or "self_attn" in name}
    assert plan.of("lm_head") == PLAIN
    # Without a list, the file: AutoAWQ leaves out modules that it doesn't list.
    q, k = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
    open_ = read_plan(config, HUB, [f"{q}.weight", f"{k}.qweight"])
    assert (open_.of(q), open_.of(k)) == (PLAIN, found)


def test_gptq():
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "lm_head": True,
        "dynamic": {
            r"-:.*\.conv\..*": {},
            r"+:.*\.layers\.1\..*": {"bits": 8},
            ".*q_proj": {"bits": 2},
        },
    }
    plan = read_plan(config, HUB)
    assert (
        plan.of("model.layers.1.self_attn.q_proj").name == "W8A16 GPTQ g128"
    )  # the first that matches
    assert plan.of("model.layers.5.self_attn.q_proj").name == "W2A16 GPTQ g128"
    assert plan.of("model.layers.10.feed_forward.experts.0.w1").name == "W4A16 GPTQ g128"
    assert plan.of("lm_head").name == "W4A16 GPTQ g128"
    assert meaning(plan) == {"model.layers.*.conv.in_proj", "model.layers.*.conv.out_proj"}
    out = "model.layers.1.self_attn.out_proj"  # which GPTQModel leaves plain
    assert read_plan(config, HUB, [f"{out}.weight"]).of(out) == PLAIN
    listed = {
        **config,
        "dynamic": None,
        "modules_in_block_to_quantize": [["self_attn.q_proj"], ["w2"]],
    }
    assert {name.rpartition(".")[2] for name in read_plan(listed, HUB).quantised_modules} == {
        "q_proj",
        "w2",
        "lm_head",
    }


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"quant_method": "quark"}, "'quark'"),
        ({"bits": 4}, "quant_method"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        (compressed({"targets": ["Linear"]}, ignore=[1]), "ignore"),
        (compressed(int4(32, "re:.*(")), r"re:|regular expression"),
        (compressed(int4(32, "Linear"), form="marlin-24"), "marlin-24"),
        (
            {**compressed(int4(32, "Linear")), "transform_config": {"config_groups": 1}},
            "transform_config",
        ),
        ({**compressed(), "config_groups": {"W8A8": ["Linear"]}}, "W8A8"),
        ({"quant_method": "fp8", "modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["*lm_head"]}, r"\*lm_head"),
        ({"quant_method": "fp8", "activation_scheme": "none"}, "'none'"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        ({"quant_method": "awq"}, "bits"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": ["a"]}, "dynamic"),
    ],
)
def test_what_we_cannot_read_is_refused_by_name(config: dict, text: str):
    with pytest.raises(UnsupportedQuantisation, match=text):
        read_plan(config, LINEARS)


def test_where_the_config_is(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert read_quantisation_config(tmp_path) is None
    plan = read_plan(None, LINEARS)
    assert (plan.method, plan.quantised_modules) == ("", frozenset())
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    plan = read_plan(read_quantisation_config(tmp_path), LINEARS)
    assert (plan.method, plan.kv_scales) == ("modelopt", False)
    inside = CONFIG | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(inside))
    assert read_quantisation_config(tmp_path) == {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedQuantisation, match=r"config\.json"):
        read_quantisation_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (compressed(int4(32, "Linear")), False),
        (compressed(int4(32, "Linear")) | {"kv_cache_scheme": {"num_bits": 8}}, True),
        ({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}, True),
    ],
)
def test_whether_there_may_be_scales_of_the_kv_cache(config: dict, expected: bool):
    assert read_plan(config, LINEARS).kv_scales is expected


def engine_name(module: str) -> str | None:
    """As an engine might hold the modules: q, k and v as one, a layer's experts as one; one layer is elsewhere."""
    if module.startswith("model.layers.9."):
        return None
    module = re.sub(r"\.experts\..*", ".experts", module)
    module = re.sub(r"\.[qkv]_proj$", ".qkv_proj", module)
    return module.replace(".conv.", ".short_conv.")


def test_an_engine_is_told_its_own_names_without_patterns():
    ignore = [r"re:.*\.conv\.(in|out)_proj$", "model.layers.2.feed_forward.experts.*", "lm_head"]
    ignore[1] = "re:" + ignore[1]
    plan = read_plan(compressed(int4(32, "Linear"), ignore=ignore), LINEARS)
    found = modules_by_engine_name(plan, engine_name)
    told = sorted(name for name, form in found.items() if form == PLAIN)
    layers = [i for i in range(LAYERS) if i != 9]
    gates = [f"model.layers.{i}.feed_forward.gate" for i in layers if i >= 2]
    convs = [
        f"model.layers.{i}.short_conv.{part}_proj"
        for i in layers
        if ARCH.layer_types[i] == "conv"
        for part in ("in", "out")
    ]
    assert told == sorted([*convs, *gates, "lm_head", "model.layers.2.feed_forward.experts"])


@pytest.mark.parametrize(
    ("ignored", "layer"),
    [
        ("model.layers.5.self_attn.k_proj", "model.layers.5.self_attn.qkv_proj"),
        ("model.layers.4.feed_forward.experts.1.down_proj", "model.layers.4.feed_forward.experts"),
    ],
)
def test_modules_that_an_engine_holds_as_one_are_alike(ignored: str, layer: str):
    plan = read_plan(compressed(int4(32, "Linear"), ignore=[ignored, "lm_head"]), LINEARS)
    with pytest.raises(UnsupportedQuantisation, match=re.escape(ignored)) as caught:
        modules_by_engine_name(plan, engine_name)
    assert layer in str(caught.value)
