"""What a checkpoint's quantization_config promises, module by module."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfm2_plugin.checkpoint.quantisation import compressed_tensors, fp8, modelopt, packed_int4
from lfm2_plugin.checkpoint.quantisation.weight_format import (
    PLAIN,
    Held,
    UnsupportedQuantisation,
    WeightFormat,
)

_Reader = Callable[[Mapping[str, Any], Iterable[str], Held], dict[str, WeightFormat]]
_READERS: dict[str, _Reader] = {
    "compressed-tensors": compressed_tensors.formats,
    "fp8": fp8.formats,
    "modelopt": modelopt.formats,
    "awq": packed_int4.awq_formats,
    "gptq": packed_int4.gptq_formats,
}
METHODS = tuple(_READERS)
# ModelOpt is named by what it has done ("modelopt_fp4") where an engine was asked for it by name.
_ALIASES = {"modelopt_fp4": "modelopt", "modelopt_mixed": "modelopt", "modelopt_mxfp8": "modelopt"}
_KV_ENTRIES = ("kv_cache_scheme", "kv_cache_quant_algo")


@dataclass(frozen=True)
class QuantisationPlan:
    """What each linear module of a checkpoint is promised to be.

    Attributes:
        method: one of METHODS, or "" for an unquantised checkpoint.
        formats: checkpoint name of a linear module -> its format.
        kv_scales: the config speaks of a quantised KV cache, whose scales may be in the file.
        kv_per_head: and of scales for each head.
    """

    method: str
    formats: Mapping[str, WeightFormat] = field(hash=False)
    kv_scales: bool = False
    kv_per_head: bool = False

    def of(self, module: str) -> WeightFormat:
        """The format of a linear module, by its name in the checkpoint; PLAIN for modules that aren't linear."""
        return self.formats.get(module, PLAIN)

    @property
    def plain_modules(self) -> frozenset[str]:
        """The linear modules that are not quantised."""
        return frozenset(name for name, found in self.formats.items() if found == PLAIN)

    @property
    def quantised_modules(self) -> frozenset[str]:
        """The linear modules that are quantised."""
        return frozenset(self.formats) - self.plain_modules


def read_plan(
    config: Mapping[str, Any] | None, linears: Iterable[str], tensors: Iterable[str] = ()
) -> QuantisationPlan:
    """Read a checkpoint's quantization_config.

    Args:
        config: as :func:`read_quantisation_config` finds it; None for an unquantised checkpoint.
        linears: all linear modules by the names that the checkpoint gives them, the router's gate and the head too.
        tensors: names of the checkpoint's tensors. They decide where the config leaves it open: what the router is,
            unless it is listed, and everything under AWQ and GPTQ without a list.

    Raises:
        UnsupportedQuantisation: a method or format that we don't know, or a malformed config.
    """
    linears = list(linears)
    if config is None:
        return QuantisationPlan("", dict.fromkeys(linears, PLAIN))
    if not isinstance(config, Mapping):
        raise UnsupportedQuantisation(
            f"quantization_config is {config!r}, not a mapping. Correct the checkpoint's config.json."
        )
    method = _method(config)
    formats = _READERS[method](config, linears, Held(tensors))
    nested = config.get("quantization")
    settings = nested if isinstance(nested, Mapping) else config
    scheme = settings.get("kv_cache_scheme")
    per_head = isinstance(scheme, Mapping) and scheme.get("strategy") == "attn_head"
    speaks = any(settings.get(key) for key in _KV_ENTRIES)
    return QuantisationPlan(method, formats, speaks, per_head)


def read_quantisation_config(folder: Path | str) -> Mapping[str, Any] | None:
    """A checkpoint's quantization_config: that of config.json, else ModelOpt's hf_quant_config.json beside it.

    Raises:
        UnsupportedQuantisation: one of the files is no JSON object.
    """
    config = _json_object(Path(folder) / "config.json")
    for key in ("quantization_config", "compression_config"):  # the latter in old releases
        if config.get(key) is not None:
            return dict(config[key]) if isinstance(config[key], Mapping) else config[key]
    beside = _json_object(Path(folder) / "hf_quant_config.json")
    return {"quant_method": "modelopt", **beside} if beside else None


def modules_by_engine_name(
    plan: QuantisationPlan, rename: Callable[[str], str | None]
) -> dict[str, WeightFormat]:
    """The formats by the engine's module names, where one may hold several modules of the checkpoint.

    Args:
        plan: what the config promises.
        rename: checkpoint name -> the engine's, None for a module that the engine doesn't have (another stage's).

    Raises:
        UnsupportedQuantisation: modules that the engine holds as one are of different formats.
    """
    first: dict[str, str] = {}
    for module, found in plan.formats.items():
        name = rename(module)
        if name is None:
            continue
        other = first.setdefault(name, module)
        if plan.formats[other] != found:
            raise UnsupportedQuantisation(
                f"quantization_config: {other} is {plan.formats[other].name} and {module} is {found.name}, but they "
                f"are served as one layer, {name}. Quantise both alike, or ignore both."
            )
    return {name: plan.formats[module] for name, module in first.items()}


def _method(config: Mapping[str, Any]) -> str:
    named = config.get("quant_method")
    if named is None and isinstance(config.get("quantization"), Mapping):
        named = "modelopt"  # only ModelOpt nests
    method = str(named).lower()
    method = _ALIASES.get(method, method)
    if method not in _READERS:
        raise UnsupportedQuantisation(
            f"The quantisation method {named!r} (quant_method in config.json) is not supported; supported are "
            f"{', '.join(METHODS)}. Use a checkpoint of one of these, or the unquantised one."
        )
    return method


def _json_object(path: Path) -> dict[str, Any]:
    """The content of a file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UnsupportedQuantisation(f"{path} is not JSON: {error}. Download it again.") from error
    if not isinstance(found, dict):
        raise UnsupportedQuantisation(f"{path} is not a JSON object. Download it again.")
    return found
