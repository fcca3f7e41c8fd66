"""What the tests of registration run inside the child: vLLM is imported there, its plugins not yet."""

import os
import sys
from typing import Any

import psutil
from vllm import ModelRegistry
from vllm.config.logging import LoggingConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import configure_logging
from vllm.model_executor.model_loader.utils import get_model_cls

from lfm2_plugin.register import ARCHITECTURE, register_vllm, resolve_vllm
from tests.engine_vllm.engine_jobs import run_engine


def resolve() -> dict[str, Any]:
    """What vLLM resolves, and what its plugins changed in its table of models."""
    configure_logging(
        LoggingConfig()
    )  # as `vllm serve` does; else nothing below a warning is shown
    before = ModelRegistry.models.copy()
    answer = resolve_vllm()
    after = ModelRegistry.models.copy()
    register_vllm()
    again = ModelRegistry.models.copy()
    return answer | {
        "known before": ARCHITECTURE in before,
        "changed": sorted(a for a in after if after[a] is not before.get(a)),
        "gone": sorted(set(before) - set(after)),
        "changed by a second call": sorted(a for a in again if again[a] is not after[a]),
    }


def configure(model: str, path: str | None = None) -> str:
    """The architecture of a model's config, as ``vllm serve`` makes one before it starts anything.

    Args:
        model: the folder.
        path: a folder in front of all that is imported from here on, in vLLM's processes too.
    """
    if path is not None:
        sys.path.insert(0, path)
        os.environ["PYTHONPATH"] = path + os.pathsep + os.environ.get("PYTHONPATH", "")
    for name in [n for n in sys.modules if n.split(".")[0] == "vllm_model"]:
        del sys.modules[name]
    return settled(model).model_config.architecture


def settled(model: str, **given: Any) -> Any:
    fixed = {"skip_tokenizer_init": True, "max_model_len": 256, "load_format": "dummy"}
    return EngineArgs(model=model, **fixed, **given).create_engine_config()


def refusals(model: str, choices: list[str]) -> list[dict[str, Any]]:
    """What each choice of LFM2_PLUGIN_OPS is refused with, and how many processes had been started by then."""
    found = []
    for choice in choices:
        os.environ["LFM2_PLUGIN_OPS"] = choice
        try:
            settled(model)
            error = None
        except Exception as raised:
            error = str(raised)
        found.append({"error": error, "processes": len(psutil.Process().children())})
    return found


def turn(model: str, values: list[str]) -> list[dict[str, Any]]:
    """Which class vLLM builds, and whose options it settles, for each value of LFM2_PLUGIN in one process."""
    found = []
    for value in values:
        os.environ["LFM2_PLUGIN"] = value
        built = get_model_cls(settled(model).model_config)
        try:
            settled(model, data_parallel_size=2)  # which we refuse on a CPU
            ours = False
        except ValueError as error:
            ours = "Start one server for each replica" in str(error)
        found.append({"class": f"{built.__module__}.{built.__qualname__}", "our options": ours})
    return found


def serve_each(model: str, values: list[str], prompts: list[list[int]]) -> list[dict[str, Any]]:
    """The class that each engine of this process builds and what it generates, for each value of LFM2_PLUGIN."""
    found = []
    for value in values:
        os.environ["LFM2_PLUGIN"] = value
        done = run_engine(model, {"dtype": "float32"}, [{"prompts": prompts}])
        found.append({"class": done["class"], "outputs": done["steps"][0]})
    return found
