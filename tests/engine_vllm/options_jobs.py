"""What runs inside the child: vLLM's options settled, no engine started."""

from typing import Any

import psutil
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs

from vllm_model import engine_api, options


def settle(model: str, **given: Any) -> Any:
    """vLLM's options, as every command and class of it settles them."""
    fixed = {"skip_tokenizer_init": True, "max_model_len": 256}
    return EngineArgs(model=model, **fixed, **given).create_engine_config()


def refusal(model: str, given: dict[str, Any]) -> dict[str, Any]:
    """The error, and how many processes had been started by then."""
    try:
        settle(model, **given)
    except ValueError as error:
        return {"error": str(error), "processes": len(psutil.Process().children())}
    return {"error": None}


def captures(model: str, cases: list[dict[str, Any]]) -> list[list[int]]:
    """The sizes that each case's options come to on a GPU that isn't there; on this CPU vLLM has settled on none.

    A case has ``max_num_seqs``, what the user says of ``max_cudagraph_capture_size`` and ``cudagraph_capture_sizes``,
    and ``performance_mode``.
    """
    engine_api.captures_graphs = lambda: True
    found = []
    for case in cases:
        config = asking_for(model, case)
        options.capture_wide_decodes(config)
        config._set_cudagraph_sizes()
        found.append(config.compilation_config.cudagraph_capture_sizes)
    return found


def left_alone(model: str, cases: list[dict[str, Any]], largest: int) -> list[bool]:
    """Whether we leave each case as it is on a GPU where vLLM itself captures up to ``largest``."""
    engine_api.captures_graphs = lambda: True
    engine_api.largest_capture = lambda: largest
    found = []
    for case in cases:
        config = asking_for(model, case)
        options.capture_wide_decodes(config)
        found.append(config.compilation_config.cudagraph_capture_sizes is None)
    return found


def asking_for(model: str, case: dict[str, Any]) -> Any:
    """vLLM's options before it has settled on captures."""
    config = settle(model, max_num_seqs=case["max_num_seqs"], max_num_batched_tokens=8192)
    compilation = config.compilation_config
    compilation.max_cudagraph_capture_size = case.get("max_cudagraph_capture_size")
    compilation.cudagraph_capture_sizes = case.get("cudagraph_capture_sizes")
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.performance_mode = case.get("performance_mode", "balanced")
    return config


def captures_on_this_machine(model: str) -> int | None:
    return settle(model, max_num_seqs=1024).compilation_config.max_cudagraph_capture_size
