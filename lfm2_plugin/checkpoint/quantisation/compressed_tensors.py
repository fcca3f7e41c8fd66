"""The configs of compressed-tensors, which llm-compressor writes: groups of targets, and a list to ignore."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lfm2_plugin.checkpoint.quantisation.weight_format import (
    FLOAT,
    FP8,
    FP32,
    INDEX,
    INT8,
    INT32,
    PLAIN,
    UINT8,
    Dtypes,
    Held,
    UnsupportedQuantisation,
    WeightFormat,
    begins_with,
    is_router,
    strings,
)

# The classes of the modules in transformers 5, base classes included, as entries may name them.
_LINEAR = ("Linear", "Module")
_ROUTER = ("Lfm2MoeTopKRouter", "Module")
_NAIVE = ("int-quantized", "float-quantized", "naive-quantized")


def formats(
    config: Mapping[str, Any], linears: Iterable[str], held: Held
) -> dict[str, WeightFormat]:
    """What each linear module is promised to be, by the rules of compressed-tensors' own matcher.

    Raises:
        UnsupportedQuantisation: the config is malformed, or has a format that we don't know.
    """
    for key in ("transform_config", "sparsity_config"):
        value = config.get(key)
        if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            raise UnsupportedQuantisation(
                f"quantization_config: {key} is not supported. Quantise the model without it."
            )
    by_target = _by_target(config)
    targets, ignore = Entries(by_target), Entries(strings(config, "ignore"))
    found = {}
    for module in linears:
        target = None if ignore.first(module) else targets.first(module)
        promised = PLAIN if target is None else by_target[target]
        if is_router(module) and not ignore.first(module):
            promised = held.decide(module, by_target.get(target or "Linear", PLAIN), promised)
        found[module] = promised
    return found


class Entries:
    """Targets or a list to ignore; a list may name each expert, so names are looked up."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._names = frozenset(entries)
        self._patterns = sorted(entry for entry in self._names if entry.startswith("re:"))

    def first(self, module: str) -> str | None:
        """The entry that decides for a module: its name before a regular expression before its class."""
        if module in self._names:
            return module
        for entry in self._patterns:
            if begins_with(entry.removeprefix("re:"), module):
                return entry
        classes = _ROUTER if is_router(module) else _LINEAR
        return next((name for name in classes if name in self._names), None)


def _by_target(config: Mapping[str, Any]) -> dict[str, WeightFormat]:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping):
        raise UnsupportedQuantisation(
            "quantization_config of compressed-tensors lacks config_groups. Use the config.json that came with the "
            "checkpoint."
        )
    found = {}
    for name, scheme in groups.items():
        if not isinstance(scheme, Mapping):
            raise UnsupportedQuantisation(
                f"quantization_config: config_groups[{name!r}] is {scheme!r}, not a scheme with targets and weights. "
                "Write the scheme out."
            )
        made = _scheme_format(scheme, str(scheme.get("format") or config.get("format")), name)
        found.update(dict.fromkeys(strings(scheme, "targets"), made))
    return found


def _scheme_format(scheme: Mapping[str, Any], form: str, group: str) -> WeightFormat:
    """The format of a scheme's linear layers; ``group`` is for messages."""
    weights, inputs = scheme.get("weights"), scheme.get("input_activations") or {}
    if not weights or form == "dense":
        return PLAIN
    if form in _NAIVE:
        parameters: dict[str, Dtypes] = {"weight": _naive_dtype(weights, form, group)}
        parameters["weight_scale"] = FLOAT
    elif form == "pack-quantized":
        parameters = {"weight_packed": INT32, "weight_scale": FLOAT, "weight_shape": INDEX}
    elif form == "nvfp4-pack-quantized":
        parameters = {"weight_packed": UINT8, "weight_scale": FP8, "weight_global_scale": FP32}
    elif form == "mxfp4-pack-quantized":
        parameters = {"weight_packed": UINT8, "weight_scale": UINT8}
    elif form == "mxfp8-quantized":
        parameters = {"weight": FP8, "weight_scale": UINT8}
    else:
        raise UnsupportedQuantisation(
            f"quantization_config: config_groups[{group!r}] is of format {form!r}, which is not supported. Save the "
            "model compressed, with llm-compressor 0.14 or later."
        )
    optional: dict[str, Dtypes] = {}
    zero_point = INT32 if form == "pack-quantized" else INT8
    # Older releases wrote the zeros of a symmetric scheme too.
    (optional if weights.get("symmetric", True) else parameters)["weight_zero_point"] = zero_point
    if weights.get("actorder") == "group":
        parameters["weight_g_idx"] = INDEX
    if inputs.get("strategy") == "tensor_group":
        parameters["input_global_scale"] = FP32
    elif inputs and inputs.get("dynamic") is False:
        parameters["input_scale"] = FLOAT
        (optional if inputs.get("symmetric", True) else parameters)["input_zero_point"] = INT8
    return WeightFormat(_name(weights, inputs, form), parameters, optional)


def _naive_dtype(weights: Mapping[str, Any], form: str, group: str) -> Dtypes:
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    if kind == "int" and bits <= 8:
        return INT8
    if kind == "float" and bits == 8:
        return FP8
    raise UnsupportedQuantisation(
        f"quantization_config: config_groups[{group!r}] has weights of type {kind!r} with {bits} bits in the format "
        f"{form!r}, which is not supported."
    )


def _name(weights: Mapping[str, Any], inputs: Mapping[str, Any], form: str) -> str:
    """Such as "W4A16 int4 g128", "W8A8 fp8 block 128x128"."""
    family = {"nvfp4-pack-quantized": "NVFP4", "mxfp4-pack-quantized": "MXFP4"}
    bits = weights.get("num_bits", 8)
    kind = family.get(form, f"{'fp' if weights.get('type') == 'float' else 'int'}{bits}")
    if form == "mxfp8-quantized":
        kind = "MXFP8"
    name = f"W{bits}A{inputs.get('num_bits', 8) if inputs else 16} {kind}"
    if weights.get("strategy") == "group":
        name += f" g{weights.get('group_size')}"
    elif weights.get("strategy") == "block":
        name += " block " + "x".join(map(str, weights.get("block_structure") or ()))
    if inputs and inputs.get("dynamic") is False:
        name += ", static activations"
    return name
