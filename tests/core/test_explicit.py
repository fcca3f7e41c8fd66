"""Lists of modules written out in full names: they mean what the entries meant, and nothing else."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint.names import linear_modules
from lfm2_plugin.checkpoint.quantisation import PLAIN, UnsupportedQuantisation, explicit, read_plan
from lfm2_plugin.checkpoint.spellings import alternate, hub_name
from tests import tiny
from tests.engine_common.int8_weights import W8A8

ARCH = Lfm2MoeArch.from_config(tiny.make_config())
HUB = [module for module in linear_modules(ARCH) if module != "lm_head"]
COMPRESSOR = [alternate(module) for module in HUB]

# Of each list some entries; those that engines serve as one layer stay together.
ENTRIES = [
    "lm_head", "re:.*feed_forward.gate$", r"re:.*\.conv\.(in|out)_proj$", "re:.*conv.*", r"re:.*\.experts\..*",
    "re:.*self_attn.*", "model.layers.2.self_attn.out_proj", r"re:model\.layers\.[0-3]\..*",
    "model.layers.0.conv.in_proj", r"re:.*feed_forward\.(w[13]|gate_proj|up_proj)$",
]  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "fp8": {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["model.layers.1", "gate", "model.layers.0.conv.in_proj"],
    },
    "modelopt": {
        "quant_method": "modelopt", "quant_algo": "NVFP4",
        "ignore": ["lm_head", "model.layers.*.feed_forward.gate", "*self_attn*"],
    },
    "modelopt, nested": {
        "quantization": {"quant_algo": "FP8", "exclude_modules": ["gate", "*conv*"]},
    },
    "awq": {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True,
        "modules_to_not_convert": ["conv", "layers.3.feed_forward.experts"],
    },
    "gptq": {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False,
        "modules_in_block_to_quantize": [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["w1", "w2", "w3"],
        ],
    },
}  # fmt: skip


def check(config: dict[str, Any], modules: list[str]) -> None:
    before = copy.deepcopy(config)
    plan = read_plan(config, modules)
    again = explicit(config, plan, hub_name)
    assert config == before
    assert read_plan(again, modules).formats == plan.formats
    on_hub = {hub_name(module): form for module, form in plan.formats.items()}
    assert read_plan(again, list(on_hub)).formats == on_hub
    assert explicit(again, plan, hub_name) == again


@pytest.mark.parametrize("modules", [HUB, COMPRESSOR], ids=["hub", "llm-compressor"])
def test_compressed_tensors(modules: list[str]) -> None:
    rng = random.Random(0)
    for _ in range(40):
        ignore = rng.sample(ENTRIES, rng.randrange(len(ENTRIES)))
        check({**copy.deepcopy(W8A8), "ignore": ignore}, modules)


@pytest.mark.parametrize("modules", [HUB, COMPRESSOR], ids=["hub", "llm-compressor"])
def test_two_groups(modules: list[str]) -> None:
    """Experts by name in one group, the other layers by their class in the other."""
    config = copy.deepcopy(W8A8)
    eight = config["config_groups"]["group_0"]
    four = {
        "targets": [r"re:.*\.experts\..*"],
        "format": "pack-quantized",
        "weights": {**eight["weights"], "num_bits": 4, "strategy": "group", "group_size": 32},
    }
    config["config_groups"] = {"group_0": eight, "group_1": four}
    config["ignore"] = ["lm_head", "re:.*gate$"]
    check(config, modules)
    names = {form.name for form in read_plan(config, modules).formats.values()}
    assert names == {"unquantised", "W8A8 int8", "W4A16 int4 g32"}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("modules", [HUB, COMPRESSOR], ids=["hub", "llm-compressor"])
def test_other_methods(name: str, modules: list[str]) -> None:
    check(copy.deepcopy(OTHERS[name]), modules)
    formats = read_plan(OTHERS[name], modules).formats.values()
    assert PLAIN in formats
    assert any(form != PLAIN for form in formats)


@pytest.mark.parametrize(
    "entry",
    ["model.layers.2.self_attn.k_proj", "model.layers.0.feed_forward.w3", r"re:.*\.experts\.5\..*"],
)
def test_parts_of_one_layer_of_different_formats(entry: str) -> None:
    config = {**copy.deepcopy(W8A8), "ignore": [entry]}
    with pytest.raises(UnsupportedQuantisation, match="served as one layer"):
        explicit(config, read_plan(config, HUB), hub_name)
