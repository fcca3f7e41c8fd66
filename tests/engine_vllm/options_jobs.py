"""What runs inside the child: vLLM's options settled, no engine started."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import psutil
import torch
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.worker.gpu import cudagraph_utils

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


def captures(model: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each case's options come to on a GPU that isn't there; on this CPU vLLM has settled on no captures.

    A case has ``max_num_seqs``, what the user says of ``max_cudagraph_capture_size`` and ``cudagraph_capture_sizes``,
    ``performance_mode``, and ``blackwell``: whether the GPU is one. Found are the ``sizes`` that vLLM makes of it, and
    the ``widest`` decode: how many tokens the graph holds that runs for as many sequences as may run at once (0: none).
    """
    found = []
    for case in cases:
        config = settle(model, max_num_seqs=case["max_num_seqs"], max_num_batched_tokens=8192)
        compilation = config.compilation_config
        compilation.max_cudagraph_capture_size = case.get("max_cudagraph_capture_size")
        compilation.cudagraph_capture_sizes = case.get("cudagraph_capture_sizes")
        compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        config.performance_mode = case.get("performance_mode", "balanced")
        family_of_gpu = 100 if case.get("blackwell") else 90
        with (
            patch.object(engine_api, "captures_graphs", lambda: True),
            patch.object(
                type(current_platform),
                "is_device_capability_family",
                staticmethod(lambda family, device_id=0, kind=family_of_gpu: family == kind),
            ),
        ):
            options.capture_wide_decodes(config)
            config._set_cudagraph_sizes()
        found.append({"sizes": compilation.cudagraph_capture_sizes, "widest": widest(config)})
    return found


def widest(config: Any) -> int:
    """How many tokens the graph holds that vLLM's runner would replay for a decode of all sequences; 0 without one."""
    sequences = config.scheduler_config.max_num_seqs
    one_stage = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    no_pool = SimpleNamespace(get_global_graph_pool=lambda: None)
    with (
        patch.object(cudagraph_utils, "get_pp_group", lambda: one_stage),
        patch.object(cudagraph_utils, "current_platform", no_pool),
    ):
        manager = cudagraph_utils.CudaGraphManager(
            config, torch.device("cpu"), config.compilation_config.cudagraph_mode, 1
        )
    manager._graphs_captured = True
    graph = manager.dispatch(sequences, sequences, 1, 0)
    return graph.num_tokens if graph.cg_mode == CUDAGraphMode.FULL else 0


def captures_on_this_machine(model: str) -> int | None:
    return settle(model, max_num_seqs=1024).compilation_config.max_cudagraph_capture_size
