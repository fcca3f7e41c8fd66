"""A quantization_config whose lists of modules are written out in full names, for the engines.

Each engine matches the entries of such lists by rules of its own, on names of its own layers: a regular expression for
a checkpoint's name may mean nothing there, or a short name too much. Full names of the hub mean the same everywhere:
engines rename them with their modules.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lfm2_plugin.checkpoint.quantisation.compressed_tensors import Entries
from lfm2_plugin.checkpoint.quantisation.plan import QuantisationPlan, modules_by_engine_name
from lfm2_plugin.checkpoint.quantisation.weight_format import strings

_CLASS = (
    "Linear"  # a target that means every linear layer; engines know that the head is none of them
)
_EXPERTS = ".experts."
_HEAD = "lm_head"
_FUSED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj") | dict.fromkeys(
    ("w1", "w3"), "w13"
)


def explicit(
    config: Mapping[str, Any], plan: QuantisationPlan, hub_name: Callable[[str], str]
) -> dict[str, Any]:
    """The config with the same meaning and full names in its lists.

    Args:
        config: that ``plan`` was read from.
        plan: what each module of the files is, by the files' names.
        hub_name: a module's name on the hub by its name in the files; both are written, so that the config can be read
            again by either.

    Raises:
        UnsupportedQuantisation: modules that engines serve as one layer are of different formats.
    """
    modules_by_engine_name(plan, lambda module: _served_as(hub_name(module)))
    plain = _both(plan.plain_modules, hub_name) | ({_HEAD} - plan.formats.keys())
    made = copy.deepcopy(dict(config))
    if plan.method == "compressed-tensors":
        made["ignore"] = sorted(plain)
        _write_targets(made, plan, hub_name)
    elif plan.method == "fp8":
        made.pop("modules_to_not_convert", None)
        made["ignored_layers"] = sorted(plain)
    elif plan.method == "modelopt":
        settings = made["quantization"] if isinstance(made.get("quantization"), dict) else made
        present = [key for key in ("exclude_modules", "ignore") if key in settings]
        for key in present or ["exclude_modules" if settings is not made else "ignore"]:
            settings[key] = _with_layers(plain)
    elif plan.method == "awq":
        made["modules_to_not_convert"] = _with_layers(plain)
    elif plan.method == "gptq":
        made["modules_in_block_to_quantize"] = _with_layers(_both(plan.quantised_modules, hub_name))
        # Of experts vLLM asks these patterns alone, the first that matches.
        layers = _layers_of_experts(plain)
        left_out: dict[str, Any] = {f"-:{re.escape(layer)}(\\..*)?$": {} for layer in layers}
        made["dynamic"] = left_out | (made.get("dynamic") or {})
    return made


def _write_targets(
    made: dict[str, Any], plan: QuantisationPlan, hub_name: Callable[[str], str]
) -> None:
    """Full names in the targets of each group, but for the class that means every linear layer."""
    groups = made["config_groups"]
    owner = {target: name for name, scheme in groups.items() for target in scheme["targets"]}
    chosen: dict[str, set[str]] = {name: set() for name in groups}
    targets = Entries(owner)
    for module in plan.quantised_modules:
        # A router is no Linear in transformers 5, but is written with them where a file holds it quantised.
        chosen[owner[targets.first(module) or _CLASS]] |= _both({module}, hub_name)
    for name, scheme in groups.items():
        told = strings(scheme, "targets")
        names = chosen[name] & {_HEAD} if _CLASS in told else chosen[name]
        classes = [t for t in told if "." not in t and not t.startswith("re:") and t != _HEAD]
        scheme["targets"] = classes + sorted(names)


def _both(modules: Iterable[str], hub_name: Callable[[str], str]) -> set[str]:
    modules = set(modules)
    return modules | {hub_name(module) for module in modules}


def _served_as(module: str) -> str:
    """The layer of an engine that a module of the hub is part of."""
    place, _, last = module.rpartition(".")
    if _EXPERTS in module:
        return place.partition(_EXPERTS)[0] + ".experts"
    return f"{place}.{_FUSED.get(last, last)}"


def _with_layers(modules: set[str]) -> list[str]:
    return sorted(modules) + _layers_of_experts(modules)


def _layers_of_experts(modules: Iterable[str]) -> list[str]:
    """The modules that hold these experts: engines ask for the experts of a layer by one name."""
    return sorted(
        {name.partition(_EXPERTS)[0] + ".experts" for name in modules if _EXPERTS in name}
    )
