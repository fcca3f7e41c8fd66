"""The configs of NVIDIA ModelOpt, in config.json (flat) or in hf_quant_config.json (nested)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import translate
from functools import cache
from typing import Any

from lfm2_plugin.checkpoint.quantisation.tiles import CHANNEL, EACH, WHOLE, Tile, is_size
from lfm2_plugin.checkpoint.quantisation.weight_format import (
    FLOAT,
    FP8,
    FP32,
    PLAIN,
    UINT8,
    Held,
    UnsupportedQuantisation,
    WeightFormat,
    is_router,
    strings,
)

_WILDCARD = frozenset("*?[")
MIXED = "MIXED_PRECISION"
_NVFP4_GROUP = 16
_PER_BYTE = Tile(1, 2)

# The shapes are those of the engines' parameters: the classes K... of vLLM's quantization/modelopt.py, and SGLang's
# quantization/modelopt_quant.py. ModelOpt itself writes blocks' scales with four dimensions.
ALGORITHMS = {
    "FP8": WeightFormat(
        "W8A8 fp8, static activations",
        {"weight": FP8, "weight_scale": FP32, "input_scale": FP32},
        layouts={"weight": (EACH,), "weight_scale": (WHOLE,), "input_scale": (WHOLE,)},
    ),
    "FP8_PER_CHANNEL_PER_TOKEN": WeightFormat(
        "W8A8 fp8 per channel",
        {"weight": FP8, "weight_scale": FLOAT},
        layouts={"weight": (EACH,), "weight_scale": (CHANNEL,)},
    ),
    "FP8_PB_WO": WeightFormat(
        "W8A16 fp8 block",
        {"weight": FP8, "weight_scale": FLOAT},
        layouts={"weight": (EACH,), "weight_scale": (Tile(128, 128, spaced=True),)},
    ),
    "NVFP4": WeightFormat(
        "W4A4 NVFP4",
        {"weight": UINT8, "weight_scale": FP8, "weight_scale_2": FP32, "input_scale": FP32},
    ),
    "W4A16_NVFP4": WeightFormat(
        "W4A16 NVFP4",
        {"weight": UINT8, "weight_scale": FP8, "weight_scale_2": FP32},
        {"input_scale": FP32},
    ),
    "MXFP8": WeightFormat(
        "W8A8 MXFP8",
        {"weight": FP8, "weight_scale": UINT8},
        layouts={"weight": (EACH,), "weight_scale": (Tile(1, 32),)},
    ),
}


def formats(
    config: Mapping[str, Any], linears: Iterable[str], held: Held
) -> dict[str, WeightFormat]:
    """What each linear module is promised to be.

    Entries of the lists are wildcards for the whole name or for one of its parts; without a wildcard they are names
    of the module or of one around it, from the beginning or not ("gate", "model.layers.1").

    Raises:
        UnsupportedQuantisation: an algorithm that we don't know.
    """
    settings = config.get("quantization", config)
    if not isinstance(settings, Mapping):
        raise UnsupportedQuantisation(
            f"quantization_config of modelopt: quantization is {settings!r}, not a mapping."
        )
    ignore = strings(settings, "exclude_modules") + strings(settings, "ignore")
    algorithm = str(settings.get("quant_algo") or "").upper()
    if algorithm == MIXED:
        layers = settings.get("quantized_layers") or {}
        listed = {name: _algorithm(dict(entry), settings) for name, entry in layers.items()}
        return {
            module: PLAIN if is_ignored(module, ignore) else _around(module, listed)
            for module in linears
        }
    made = _algorithm(settings)
    found = {}
    for module in linears:
        # The router is no Linear in transformers 5, so not every release lists it.
        decided = held.decide(module, made, PLAIN) if is_router(module) else made
        found[module] = PLAIN if is_ignored(module, ignore) else decided
    return found


def is_ignored(module: str, ignore: Iterable[str]) -> bool:
    """Whether an entry of ``ignore`` means the module."""
    dotted = f".{module}."
    for entry in ignore:
        if f".{entry}." in dotted:
            return True
        if _WILDCARD.isdisjoint(entry):
            continue
        wanted = _wildcard(entry)
        if wanted.match(module) or ("." not in entry and any(map(wanted.match, module.split(".")))):
            return True
    return False


@cache
def _wildcard(entry: str) -> re.Pattern[str]:
    return re.compile(translate(entry))  # which is a regular expression whatever the entry is


def _algorithm(
    settings: Mapping[str, Any], around: Mapping[str, Any] | None = None
) -> WeightFormat:
    """The format of settings; what these leave open, those around them say."""
    name = settings.get("quant_algo")
    found = ALGORITHMS.get(str(name or "").upper())
    if found is None:
        known = ", ".join([*ALGORITHMS, MIXED])
        raise UnsupportedQuantisation(
            f"quantization_config of modelopt: quant_algo {name!r} is not supported (supported: {known})."
        )
    if not found.name.endswith("NVFP4"):
        return found
    group = settings.get("group_size") or (around or {}).get("group_size") or _NVFP4_GROUP
    if not is_size(group):
        raise UnsupportedQuantisation(
            f"quantization_config of modelopt: group_size is {group!r}, not a number of weights. Use the config.json "
            "that came with the checkpoint."
        )
    scales = dict.fromkeys(("weight_scale_2", "input_scale"), (WHOLE,))
    layouts = {"weight": (_PER_BYTE,), "weight_scale": (Tile(1, group),), **scales}
    return replace(found, layouts=layouts)


def _around(module: str, listed: Mapping[str, WeightFormat]) -> WeightFormat:
    """The entry of the module or of the nearest module around it, such as that of all experts of a layer."""
    while module and module not in listed:
        module = module.rpartition(".")[0]
    return listed.get(module, PLAIN)
