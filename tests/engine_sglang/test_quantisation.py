"""Quantised checkpoints name LFM2's modules as LFM2 does; SGLang looks schemes up by other names. No kernels here."""

import pytest
import torch
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from sglang.srt.models.lfm2_moe import Lfm2MoeForCausalLM as Builtin

from sglang_model.model import Lfm2MoeForCausalLM as Ours

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


def experts_scheme(found: CompressedTensorsConfig) -> dict | None:
    """What SGLang finds for a layer's experts, by the three names that it asks for."""
    names = [f"{LAYER}.experts.0.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
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
