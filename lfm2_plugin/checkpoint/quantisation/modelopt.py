"""The configs of NVIDIA ModelOpt, in config.json (flat) or in hf_quant_config.json (nested)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import translate
from functools import cache
from typing import Any

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
ALGORITHMS = {
    "FP8": WeightFormat(
        "W8A8 fp8, static activations",
        {"weight": FP8, "weight_scale": FP32, "input_scale": FP32},
    ),
    "FP8_PER_CHANNEL_PER_TOKEN": WeightFormat(
        "W8A8 fp8 per channel", {"weight": FP8, "weight_scale": FLOAT}
    ),
    "FP8_PB_WO": WeightFormat("W8A16 fp8 block", {"weight": FP8, "weight_scale": FLOAT}),
    "NVFP4": WeightFormat(
        "W4A4 NVFP4",
        {"weight": UINT8, "weight_scale": FP8, "weight_scale_2": FP32, "input_scale": FP32},
    ),
    "W4A16_NVFP4": WeightFormat(
        "W4A16 NVFP4",
        {"weight": UINT8, "weight_scale": FP8, "weight_scale_2": FP32},
        {"input_scale": FP32},
    ),
    "MXFP8": WeightFormat("W8A8 MXFP8", {"weight": FP8, "weight_scale": UINT8}),
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
        listed = {name: _algorithm(dict(entry).get("quant_algo")) for name, entry in layers.items()}
        return {
            module: PLAIN if is_ignored(module, ignore) else _around(module, listed)
            for module in linears
        }
    made = _algorithm(algorithm)
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


def _algorithm(name: Any) -> WeightFormat:
    found = ALGORITHMS.get(str(name or "").upper())
    if found is None:
        known = ", ".join([*ALGORITHMS, MIXED])
        raise UnsupportedQuantisation(
            f"quantization_config of modelopt: quant_algo {name!r} is not supported (supported: {known})."
        )
    return found


def _around(module: str, listed: Mapping[str, WeightFormat]) -> WeightFormat:
    """The entry of the module or of the nearest module around it, such as that of all experts of a layer."""
    while module and module not in listed:
        module = module.rpartition(".")[0]
    return listed.get(module, PLAIN)
