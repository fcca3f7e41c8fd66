"""The configs of the method "fp8": block-wise as DeepSeek and transformers write it, or one scale a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lfm2_plugin.checkpoint.quantisation.tiles import EACH, WHOLE, Tile, is_size
from lfm2_plugin.checkpoint.quantisation.weight_format import (
    FLOAT,
    FP8,
    PLAIN,
    Held,
    UnsupportedQuantisation,
    WeightFormat,
    begins_with,
    is_router,
    strings,
)


def formats(
    config: Mapping[str, Any], linears: Iterable[str], held: Held
) -> dict[str, WeightFormat]:
    """What each linear module is promised to be.

    Entries of the lists count as transformers counts them: as the beginning of a name (a regular expression) or as its
    end. AutoFP8's "re:" is understood.

    Raises:
        UnsupportedQuantisation: an activation scheme or block size that does not exist.
    """
    made = _format(config)
    entries = strings(config, "modules_to_not_convert") + strings(config, "ignored_layers")
    ends, beginnings = tuple(entries), [entry.removeprefix("re:") for entry in entries]
    found = {}
    for module in linears:
        if module.endswith(ends) or any(begins_with(entry, module) for entry in beginnings):
            found[module] = PLAIN
        elif is_router(module) or module == "lm_head":
            # transformers leaves the head out by itself, and the router, which is no Linear, too.
            found[module] = held.decide(module, made, PLAIN)
        else:
            found[module] = made
    return found


def _format(config: Mapping[str, Any]) -> WeightFormat:
    """The one format of a config.

    Shapes as the engines' parameters have them (``Fp8LinearMethod.create_weights`` and ``Fp8MoEMethod`` in vLLM's and
    SGLang's ``quantization/fp8.py``): one scale a weight, or one a block, the last of which may be partial.
    """
    scheme = config.get("activation_scheme", "dynamic")
    block = config.get("weight_block_size")
    if scheme not in ("dynamic", "static") or (scheme == "static" and block is not None):
        raise UnsupportedQuantisation(
            f"quantization_config of fp8: activation_scheme {scheme!r} with weight_block_size {block!r} is not "
            'supported: "dynamic", or "static" without blocks.'
        )
    if block is None:
        parameters = {"weight": FP8, "weight_scale": FLOAT}
        if scheme == "static":
            parameters["input_scale"] = FLOAT
        scales = dict.fromkeys(("weight_scale", "input_scale"), (WHOLE,))
        name = f"W8A8 fp8, {scheme} activations"
        return WeightFormat(name, parameters, layouts={"weight": (EACH,), **scales})
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(map(is_size, block))):
        raise UnsupportedQuantisation(
            f"quantization_config of fp8: weight_block_size is {block!r}, not two numbers."
        )
    name = f"W8A8 fp8 block {block[0]}x{block[1]}"
    layouts = {"weight": (EACH,), "weight_scale_inv": (Tile(*block),)}
    return WeightFormat(name, {"weight": FP8, "weight_scale_inv": FLOAT}, layouts=layouts)
