"""The configs of compressed-tensors, which llm-compressor writes: groups of targets, and a list to ignore."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lfm2_plugin.checkpoint.quantisation.tiles import (
    CHANNEL,
    COLUMN,
    EACH,
    WHOLE,
    Fixed,
    Layout,
    Tile,
    dense,
    is_bits,
    is_size,
    whole,
)
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
    layouts = _layouts(weights, inputs, form, group)
    return WeightFormat(_name(weights, inputs, form), parameters, optional, layouts)


def _layouts(
    weights: Mapping[str, Any], inputs: Mapping[str, Any], form: str, group: str
) -> dict[str, tuple[Layout, ...]]:
    """What the shapes of a scheme's tensors follow.

    As compressed-tensors initializes scales (``quantization/lifecycle/initialize.py``) and packs weights
    (``compressors/``); ``tests/core/test_quantised_formats.py`` compares them with what it writes. vLLM has the same
    shapes in its parameters (``compressed_tensors/schemes``), but for integers of a number of bits that doesn't divide
    32, which it has without gaps: both are right.
    """
    scales = _scales(weights, group)
    found: dict[str, tuple[Layout, ...]] = {
        "weight": (EACH,),
        "weight_scale": (scales,),
        "weight_zero_point": (scales,),
        "weight_g_idx": (COLUMN,),
        "weight_shape": (Fixed((2,)),),
        "weight_global_scale": (WHOLE,),
        "input_global_scale": (WHOLE,),
    }
    if form == "pack-quantized":
        bits = weights.get("num_bits", 8)
        if not is_bits(bits):
            raise _malformed(group, "num_bits", bits)
        packed = (whole(bits), dense(bits))
        found["weight_packed"] = tuple(Tile(1, each) for each in packed)
        found["weight_zero_point"] = tuple(Tile(each, scales.columns) for each in packed)
    else:
        found["weight_packed"] = (Tile(1, 2),)
    if inputs.get("strategy", "tensor") == "tensor":
        found["input_scale"] = found["input_zero_point"] = (WHOLE,)
    return found


def _scales(weights: Mapping[str, Any], group: str) -> Tile:
    """The weights that share a scale; without a strategy by the size of a group, as in compressed-tensors."""
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "tensor":
        return WHOLE
    if strategy == "channel":
        return CHANNEL
    if strategy in ("group", "tensor_group"):
        if not is_size(size):
            raise _malformed(group, "group_size", size)
        return Tile(1, size)
    if strategy != "block":
        raise _malformed(group, "strategy", strategy)
    told = weights.get("block_structure")
    block = told.split("x") if isinstance(told, str) else told
    if not isinstance(block, list | tuple) or len(block) != 2:
        raise _malformed(group, "block_structure", told)
    rows, columns = (int(n) if isinstance(n, str) and n.isdecimal() else n for n in block)
    if not (is_size(rows) and is_size(columns)):
        raise _malformed(group, "block_structure", told)
    return Tile(rows, columns)


def _malformed(group: str, key: str, value: Any) -> UnsupportedQuantisation:
    return UnsupportedQuantisation(
        f"quantization_config: config_groups[{group!r}] has weights with the {key} {value!r}, which is not supported. "
        "Use the config.json that came with the checkpoint."
    )


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
