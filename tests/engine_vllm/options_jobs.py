"""What runs inside the child: vLLM's options settled, no engine started."""

from typing import Any

import psutil
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


def captures(model: str, cases: list[dict[str, Any]]) -> list[int | None]:
    """The largest capture that each case's options come to on a GPU; on this CPU vLLM has settled on none.

    A case has ``max_num_seqs``, and what the user says of ``max_cudagraph_capture_size`` and
    ``cudagraph_capture_sizes``.
    """
    engine_api.captures_graphs = lambda: True
    found = []
    for case in cases:
        config = settle(model, max_num_seqs=case["max_num_seqs"], max_num_batched_tokens=8192)
        compilation = config.compilation_config
        compilation.max_cudagraph_capture_size = case.get("max_cudagraph_capture_size")
        compilation.cudagraph_capture_sizes = case.get("cudagraph_capture_sizes")
        options.capture_wide_decodes(config)
        found.append(compilation.max_cudagraph_capture_size)
    return found


def captures_on_this_machine(model: str) -> int | None:
    return settle(model, max_num_seqs=1024).compilation_config.max_cudagraph_capture_size
