"""The configs of GPTQ and AWQ: integers in groups, eight of four bits in one int32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lfm2_plugin.checkpoint.quantisation.tiles import COLUMN, Tile, dense, is_bits, is_size, whole
from lfm2_plugin.checkpoint.quantisation.weight_format import (
    FLOAT,
    INT32,
    PLAIN,
    Held,
    UnsupportedQuantisation,
    WeightFormat,
    begins_with,
    is_router,
    strings,
)

_IN_LAYERS = ".layers."  # both quantise decoder layers; the head only where the config says so


def awq_formats(
    config: Mapping[str, Any], linears: Iterable[str], held: Held
) -> dict[str, WeightFormat]:
    """What each linear module is promised to be by AutoAWQ: an entry of ``modules_to_not_convert`` is a part of a name.

    Without entries the file decides, since tools leave out modules that they don't list.
    """
    made = _awq(config)
    entries = strings(config, "modules_to_not_convert")
    found = {}
    for module in linears:
        if any(entry in module for entry in entries) or not _may_be(module, config):
            found[module] = PLAIN
        elif entries and not is_router(module):
            found[module] = made
        else:
            found[module] = held.decide(module, made, PLAIN if is_router(module) else made)
    return found


def gptq_formats(
    config: Mapping[str, Any], linears: Iterable[str], held: Held
) -> dict[str, WeightFormat]:
    """What each linear module is promised to be by GPTQModel and its kin.

    ``modules_in_block_to_quantize`` has ends of names; ``dynamic`` maps regular expressions to other settings, or, with
    "-:" in front, leaves modules out. Without the former the file decides, since tools leave out modules that they
    don't list.
    """
    listed = tuple(_flat(config.get("modules_in_block_to_quantize") or ()))
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise UnsupportedQuantisation(
            f"quantization_config of gptq: dynamic is {dynamic!r}, not a mapping of patterns."
        )
    found = {}
    for module in linears:
        overrides = _overrides(module, dynamic)
        if overrides is None or not _may_be(module, config):
            found[module] = PLAIN
            continue
        made = _gptq(config, overrides)
        if listed and module != "lm_head":
            found[module] = made if module.endswith(listed) else PLAIN
        else:
            found[module] = held.decide(module, made, PLAIN if is_router(module) else made)
    return found


def _awq(config: Mapping[str, Any]) -> WeightFormat:
    """AWQ packs along the rows: shapes of ``create_weights`` in vLLM's ``auto_awq.py``, SGLang's ``awq/schemes``."""
    bits, group = config.get("w_bit", config.get("bits")), config.get("q_group_size")
    group = config.get("group_size") if group is None else group
    bits = _bits(bits, "awq")
    packed, columns = whole(bits), _group(group, "awq")
    parameters = {"qweight": INT32, "scales": FLOAT}
    zeros = {"qzeros": INT32}
    always = config.get("zero_point", True)
    return WeightFormat(
        f"W{bits}A16 AWQ g{group}",
        parameters | (zeros if always else {}),
        {} if always else zeros,
        {
            "qweight": (Tile(packed, 1, transposed=True),),
            "qzeros": (Tile(packed, columns, transposed=True),),
            "scales": (Tile(1, columns, transposed=True),),
        },
    )


def _gptq(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> WeightFormat:
    """GPTQ packs weights along the columns and zeros along the rows; an entry of g_idx is a column's group.

    Shapes of ``create_weights`` in vLLM's ``auto_gptq.py`` and SGLang's ``gptq/schemes``.
    """
    bits = _bits(overrides.get("bits", config.get("bits")), "gptq")
    group = overrides.get("group_size", config.get("group_size"))
    packed, columns = dense(bits), _group(group, "gptq")
    return WeightFormat(
        f"W{bits}A16 GPTQ g{group}",
        {"qweight": INT32, "qzeros": INT32, "scales": FLOAT},
        {"g_idx": INT32},
        {
            "qweight": (Tile(1, packed, transposed=True),),
            "qzeros": (Tile(packed, columns, transposed=True),),
            "scales": (Tile(1, columns, transposed=True),),
            "g_idx": (COLUMN,),
        },
    )


def _overrides(module: str, dynamic: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings of the first pattern that matches; None if it leaves the module out."""
    for pattern, settings in dynamic.items():
        if begins_with(pattern.removeprefix("-:").removeprefix("+:"), module):
            if pattern.startswith("-:"):
                return None
            return settings if isinstance(settings, Mapping) else {}
    return {}


def _may_be(module: str, config: Mapping[str, Any]) -> bool:
    return _IN_LAYERS in module or (module == "lm_head" and bool(config.get("lm_head")))


def _bits(value: Any, method: str) -> int:
    if not is_bits(value):
        raise UnsupportedQuantisation(
            f"quantization_config of {method}: bits is {value!r}, not a number of bits. Use the config.json that came "
            "with the checkpoint."
        )
    return value


def _group(value: Any, method: str) -> int | None:
    """The columns that share a scale; None for all of them, which is -1 in a config."""
    if value == -1:
        return None
    if not is_size(value):
        raise UnsupportedQuantisation(
            f"quantization_config of {method}: group_size is {value!r}, neither a number of weights nor -1. Use the "
            "config.json that came with the checkpoint."
        )
    return value


def _flat(entries: Any) -> Iterator[str]:
    """The names in a list of names or of lists of names."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            yield from _flat(entry)
