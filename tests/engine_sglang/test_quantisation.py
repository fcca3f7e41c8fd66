"""Quantised checkpoints name LFM2's modules as LFM2 does; SGLang looks schemes up by other names. No kernels here."""

import pytest
import torch
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from sglang.srt.models.lfm2_moe import Lfm2MoeForCausalLM as Builtin
from sglang.srt.utils.hf_transformers_utils import get_config

from sglang_model.defaults import declare
from sglang_model.model import Lfm2MoeForCausalLM as Ours
from tests.engine_common.brought import NO_CONV

LAYER = "model.layers.4.feed_forward"
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
TOKENS = {**FP8, "strategy": "token", "dynamic": True}


def config(model: type, targets: list[str], ignore: list[str]) -> CompressedTensorsConfig:
    """A compressed-tensors config of FP8 for some modules, as SGLang's loader hands it to the model."""
    groups = {"group_0": {"targets": targets, "weights": FP8, "input_activations": TOKENS}}
    return CompressedTensorsConfig.from_config(
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": groups,
            "ignore": ignore,
            "packed_modules_mapping": getattr(model, "packed_modules_mapping", {}),
        }
    )


def experts_scheme(found: CompressedTensorsConfig, layer: str = LAYER) -> dict | None:
    """What SGLang finds for a layer's experts, by the three names that it asks for."""
    names = [f"{layer}.experts.0.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    schemes = [found.get_scheme_dict(torch.nn.Identity(), name) for name in names]
    assert schemes[0] == schemes[1] == schemes[2]
    return schemes[0]


NAMED = ["re:.*experts\\.\\d+\\.w[123]$", "re:.*feed_forward\\.w[123]$", "re:.*[qkv]_proj$"]


def test_experts_are_found_by_the_names_of_the_checkpoint():
    with pytest.raises(ValueError, match="Unable to find matching target"):
        experts_scheme(config(Builtin, NAMED, []))
    assert experts_scheme(config(Ours, NAMED, []))["weights"].num_bits == 8


def test_experts_that_are_ignored_stay_as_they_are():
    ignore = [f"{LAYER}.experts.0.w{number}" for number in (1, 2, 3)]
    assert experts_scheme(config(Builtin, ["Identity"], ignore)) is not None
    assert experts_scheme(config(Ours, ["Identity"], ignore)) is None


@pytest.mark.parametrize("module", ["w13", "w2"])
def test_the_dense_layers_are_found_and_ignored_by_the_names_of_the_checkpoint(module: str):
    name = f"{LAYER}.{module}"
    found = config(Ours, NAMED, []).get_scheme_dict(torch.nn.Identity(), name)
    assert found["weights"].num_bits == 8
    ignore = [f"{LAYER}.w{number}" for number in (1, 2, 3)]
    assert config(Ours, ["Identity"], ignore).get_scheme_dict(torch.nn.Identity(), name) is None


@pytest.mark.parametrize("way", NO_CONV)
def test_ways_to_name_what_is_not_quantised(tmp_path, way: str):
    """What a list of modules means is settled on the checkpoint's names, before SGLang matches it."""
    declare()
    folder = NO_CONV[way].make(tmp_path / "model")
    settings = get_config(str(folder), trust_remote_code=False).quantization_config
    packed = {"packed_modules_mapping": Ours.packed_modules_mapping}
    found = CompressedTensorsConfig.from_config({**settings, **packed})
    linear = torch.nn.Linear(1, 1)

    def is_quantised(module: str) -> bool:
        return found.get_scheme_dict(linear, f"model.layers.{module}") is not None

    assert not is_quantised("0.conv.in_proj")
    assert not is_quantised("0.conv.out_proj")
    assert not is_quantised("1.feed_forward.gate")
    assert is_quantised("0.feed_forward.w13")
    assert is_quantised("1.self_attn.qkv_proj")
    assert is_quantised("1.self_attn.out_proj")
    assert experts_scheme(found, "model.layers.1.feed_forward") is None
