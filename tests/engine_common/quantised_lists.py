"""Configs of quantised checkpoints whose lists name modules in every way; what an engine's layers have to be."""

import json
import random
from collections.abc import Mapping
from functools import cache
from typing import Any

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import plan_of
from lfm2_plugin.checkpoint.names import linear_modules
from lfm2_plugin.checkpoint.placement import place
from lfm2_plugin.checkpoint.quantisation import (
    PLAIN,
    QuantisationPlan,
    UnsupportedQuantisation,
    explicit,
)
from lfm2_plugin.checkpoint.spellings import hub_name
from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.int8_weights import W8A8

MODEL = "alpha"
REGULAR = [
    "re:.*feed_forward.gate$", r"re:.*\.conv\.(in|out)_proj$", "re:.*conv.*", r"re:.*\.experts\..*", "re:.*self_attn.*",
    r"re:model\.layers\.[0-3]\..*", r"re:.*feed_forward\.w[13]$", "re:.*w2$", "re:.*_proj$",
]  # fmt: skip
WHOLE = [
    "lm_head", "model.layers.0.conv.in_proj", "model.layers.2.self_attn.out_proj", "model.layers.1.feed_forward.w2",
    "model.layers.4.conv.out_proj",
]  # fmt: skip
BEGINNINGS = ["model.layers.1", "model.layers.3.feed_forward.experts", "model.layers.4.conv"]
ENDS = ["gate", "out_proj", "in_proj", "self_attn.out_proj"]
PARTS = ["conv", "self_attn", "experts", "layers.2."]
WILD = ["*self_attn*", "*.conv.*", "model.layers.*.feed_forward.experts*", "model.layers.[12].*"]
METHODS = {
    "compressed-tensors": WHOLE + REGULAR, "fp8": WHOLE + BEGINNINGS + ENDS, "modelopt": WHOLE + WILD + ENDS,
    "modelopt_fp4": WHOLE + WILD + ENDS, "awq": WHOLE + PARTS + ENDS, "gptq": WHOLE + PARTS,
    "gptq_model": WHOLE + PARTS,
}  # fmt: skip
"""A method, and what its lists may hold; GPTQ says what is quantised, in later releases what is not."""


@cache
def arch() -> Lfm2MoeArch:
    return Lfm2MoeArch.from_config(json.loads((checkpoint(MODEL) / "config.json").read_text()))


def config_of(method: str, entries: list[str]) -> dict[str, Any]:
    """A quantization_config that leaves out what the entries name, or takes in nothing else."""
    if method == "compressed-tensors":
        return {**W8A8, "ignore": entries}
    if method == "fp8":
        blocks = {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}
        return {"quant_method": "fp8", **blocks, "modules_to_not_convert": entries}
    if method.startswith("modelopt"):
        algorithm = "NVFP4" if method == "modelopt_fp4" else "FP8"
        return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": entries}
    if method == "awq":
        four = {"bits": 4, "group_size": 32, "zero_point": True}
        return {"quant_method": "awq", **four, "modules_to_not_convert": entries}
    four = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    if method == "gptq":
        return {"quant_method": "gptq", **four, "modules_in_block_to_quantize": [entries]}
    left_out = {f"-:.*{entry}": {} for entry in entries}
    return {"quant_method": "gptq", **four, "dynamic": left_out}


def written(method: str, count: int) -> list[tuple[dict[str, Any], QuantisationPlan]]:
    """So many configs of a method as an engine gets them, their lists written out; and what they promise."""
    rng = random.Random(method)
    mark = "qweight" if method in ("awq", "gptq", "gptq_model") else "weight_scale"
    plain = ("gate", "lm_head")  # what the file decides, where the config leaves it open
    tensors = [f"{m}.{'weight' if m.endswith(plain) else mark}" for m in linear_modules(arch())]
    made = []
    while len(made) < count:
        entries = rng.sample(METHODS[method], rng.randint(1, 4))
        config = config_of(method, entries)
        try:
            plan = plan_of(arch(), config, tensors)
            again = explicit(config, plan, hub_name)
        except UnsupportedQuantisation:
            continue  # modules that are served as one layer are of different formats
        if plan.plain_modules - {"lm_head"} and plan.quantised_modules:
            made.append((again, plan))
    return made


def promised(plan: QuantisationPlan, renamed: Mapping[str, str]) -> dict[str, bool]:
    """Layer of an engine -> whether it is quantised.

    Args:
        plan: of the config.
        renamed: as for :func:`place`.
    """
    found = {}
    for module, form in plan.formats.items():
        where = place(f"{module}.weight", renamed)
        assert where is not None
        found[where.parameter.rpartition(".")[0].removesuffix(".routed_experts")] = form != PLAIN
    return found
