"""What the tests of registration run inside the child: SGLang is imported there, its plugins not yet."""

import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

from sglang.srt.arg_groups.overrides import model_config_of
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.server_args import ServerArgs

from lfm2_plugin.register import ARCHITECTURE, register_sglang, resolve_sglang
from tests.engine_sglang import engine_jobs


def resolve(path: str | None = None) -> dict:
    """What SGLang resolves, and how its table of models differs from the one of its own models."""
    if path is not None:
        sys.path.insert(0, path)
    answer = resolve_sglang()
    table = importlib.import_module("sglang.srt.models.registry")
    theirs = table.import_model_classes("sglang.srt.models")
    table.ModelRegistry.get_supported_archs()  # has it import what it deferred
    after = dict(table.ModelRegistry.models)
    register_sglang()
    again = table.ModelRegistry.models
    return answer | {
        "known before": ARCHITECTURE in theirs,
        "changed": sorted(a for a in theirs if after.get(a) is not theirs[a]),
        "added": sorted(set(after) - set(theirs)),
        "changed by a second call": sorted(a for a in again if again[a] is not after.get(a)),
    }


def serve(path: str, model: str, engine: dict, steps: list[dict]) -> dict:
    """One engine with the folder ``path`` in front of everything that is imported from here on.

    The fork server has parts of our front imported already; they are forgotten first.
    """
    sys.path.insert(0, path)
    for name in [n for n in sys.modules if n.split(".")[0] == "sglang_model"]:
        del sys.modules[name]
    return engine_jobs.run_engine(model, engine, steps)


def settled(model: str) -> ServerArgs:
    """SGLang's options, as a launcher settles them before it starts a process."""
    options = ServerArgs(model_path=model, **engine_jobs.DEFAULTS)
    options.resolve_once()
    return options


def offered(answers: Any) -> None:
    """What SGLang's registry would find of ours, in a worker of this process."""
    entry = importlib.import_module("sglang_model.entry.lfm2_moe")
    found = getattr(entry, "EntryClass", None)
    answers.put(found and found.__module__)


def turn(model: str, values: list[str]) -> list[dict[str, Any]]:
    """For each value of LFM2_PLUGIN in one process: whose config, options and class an engine gets."""
    load_plugins()
    found = []
    for value in values:
        os.environ["LFM2_PLUGIN"] = value
        options = settled(model)
        sources = [source for source, _ in options._resolved_overrides]
        config = type(model_config_of(options).hf_config)
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        worker = context.Process(target=offered, args=[answers])
        worker.start()
        found.append(
            {
                "config": config.__module__,
                "asked": "lfm2-plugin" in sources,
                "class": answers.get(),
                "left behind": os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE"),
            }
        )
        worker.join()
    return found


def refusals(model: str, choices: list[str]) -> list[str | None]:
    """What each choice of LFM2_PLUGIN_OPS is refused with while options are settled."""
    load_plugins()
    found = []
    for choice in choices:
        os.environ["LFM2_PLUGIN_OPS"] = choice
        try:
            settled(model)
            found.append(None)
        except Exception as error:
            found.append(str(error))
    return found


def replaced(damage: str | None) -> dict[str, Any]:
    """Our replacements of a class and of a function, after what another plugin or another release has done to them."""
    from sglang_model import engine_names, replacements

    class Ours:
        pass

    def our_function() -> str:
        return "ours"

    targets = engine_names.REPLACED
    manager, function = targets["LoRAManager"], targets["assign_req_to_token_pool_func"]
    before: dict[str | None, Callable[[], None]] = {
        None: lambda: None,
        "hooked": lambda: HookRegistry.register(function, lambda call: call(), HookType.AROUND),
        "taken": lambda: (
            HookRegistry.register(manager, type("Theirs", (), {}), HookType.REPLACE),
            HookRegistry.apply_hooks(),
        ),
        "taken function": lambda: (
            HookRegistry.register(function, lambda: "theirs", HookType.REPLACE),
            HookRegistry.apply_hooks(),
        ),
        "gone": lambda: targets.update(LoRAManager=manager + "Gone"),
    }
    before[damage]()
    replacements.replace_in_engine(LoRAManager=Ours, assign_req_to_token_pool_func=our_function)
    manager_now = importlib.import_module("sglang.srt.lora.lora_manager").LoRAManager
    allocation = importlib.import_module("sglang.srt.mem_cache.allocation")
    return {
        "class": manager_now is Ours,
        "function": allocation.assign_req_to_token_pool_func(),
    }


if __name__ == "__main__":
    print("RESULT", json.dumps(resolve()))
