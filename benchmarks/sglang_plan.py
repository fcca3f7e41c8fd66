"""One division of memory by SGLang: options, a model without weights, and the engine's own sizing of its pools.

Runs in a process where SGLang is on the platform of :mod:`benchmarks.paper_gpu`; which model class is built was settled
when that process started. Nothing here computes a size: the options are resolved and published as SGLang's scheduler
does it, and ``KVCacheConfigurator`` is asked as its model runner asks it. What is given to it: the device's memory, and
for drafts their number, since no drafter is loaded.
"""

from __future__ import annotations

import socket
import tempfile
from functools import cache
from pathlib import Path

import torch
from sglang.srt.arg_groups.overrides import model_config_of
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.bootstrap import init_parallel_runtime, measure_pre_model_load_memory
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.mem_cache.kv_cache_dtype import configure_kv_cache_dtype
from sglang.srt.model_executor.model_runner_components.layer_setup import resolve_layer_indices
from sglang.srt.model_executor.model_runner_components.spec_aux_hidden_state import (
    SpecAuxHiddenStateConfig,
)
from sglang.srt.model_loader.loader import _initialize_model
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import (
    SpawnRanks,
    get_context,
    get_exec,
    get_model,
    get_parallel,
    get_schedule,
    get_spec,
    publish,
)
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from benchmarks.models import model_folder
from benchmarks.sglang_memory import DEVICES, Case, Plan

SPECULATION = "NGRAM"
"""Whose drafts are counted: it has no model of its own, so nothing but the drafts' states comes on top."""


def plan(case: Case) -> Plan:
    """Have SGLang divide the memory of one case."""
    device = DEVICES[case.device]
    current_platform.hold(device.total, used=device.total - device.free)
    arguments = _publish(case)
    _start_groups()
    before = measure_pre_model_load_memory(
        device=current_platform.device_name, is_draft_worker=False
    )
    config = model_config_of(arguments)
    model = _build(config)
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    weights = sum(tensor.nbytes for tensor in tensors.values())
    current_platform.hold(device.total, used=device.total - device.free + weights)
    if case.drafts:
        # Each step verifies the drafts and the token before them.
        get_context().override(
            "draft tokens",
            speculative_algorithm=SPECULATION,
            speculative_num_draft_tokens=case.drafts + 1,
        )
    configurator = _configurator(arguments, config, model)
    # What the model runner calls; it leaves the number of slots in the published options.
    pools = configurator._resolve_memory_pool_config(before)
    per_request = configurator._calculate_mamba_ratio()
    slots = get_schedule().max_mamba_cache_size
    graphs = get_exec().graph.cuda_graph_config.decode
    return Plan(
        model_class=f"{type(model).__module__}.{type(model).__qualname__}",
        weight_bytes=weights,
        static_fraction=get_schedule().mem_fraction_static,
        slots=slots,
        slot_bytes=config.hf_config.mamba2_cache_params.mamba_cache_per_req,
        slots_per_request=per_request,
        kv_tokens=pools.max_total_num_tokens,
        max_running=pools.max_running_requests,
        largest_graph=graphs.max_bs if graphs.backend != "disabled" else 0,
        requests=min(
            pools.max_total_num_tokens // case.tokens,
            slots // per_request,
            pools.max_running_requests,
        ),
    )


def _publish(case: Case) -> ServerArgs:
    """Options as SGLang's launcher resolves and its scheduler publishes them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, _ = model_folder(case.model, Path(temporary))
        arguments = ServerArgs(
            model_path=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            # SGLang's default where it sees CUDA; the memory kept for graphs depends on it.
            **{"dtype": "bfloat16", "cuda_graph_backend_prefill": "breakable"} | case.options,
        )
        arguments.resolve_once()
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    return arguments


@cache
def _start_groups() -> None:
    """Process groups of one process, which layers ask for their ranks; once, as a second start is refused."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    init_parallel_runtime(server_args=get_context().server_args, device="cpu", dist_port=port)


def _build(config: ModelConfig) -> torch.nn.Module:
    """The model that SGLang resolves, on the meta device: shapes without storage."""
    with set_default_torch_dtype(config.dtype), torch.device("meta"):
        return _initialize_model(config, LoadConfig())


def _configurator(
    arguments: ServerArgs, config: ModelConfig, model: torch.nn.Module
) -> KVCacheConfigurator:
    """What the model runner makes of the same, for one GPU."""
    algorithm = SpeculativeAlgorithm.from_string(get_spec().speculative_algorithm)
    _, kv_cache_dtype = configure_kv_cache_dtype(
        server_args_kv_cache_dtype=get_model().kv_cache_dtype,
        model=model,
        model_dtype=config.dtype,
        is_draft_worker=False,
        is_dflash=False,
        speculative_draft_attention_backend="",
    )
    return KVCacheConfigurator(
        device=current_platform.device_name,
        gpu_id=0,
        attn_dp_size=get_parallel().attn_dp_size,
        pp_size=get_parallel().pp_size,
        pp_group=get_parallel().pp_group,
        model=model,
        model_config=config,
        server_args=arguments,
        kv_cache_dtype=kv_cache_dtype,
        model_dtype=config.dtype,
        page_size=get_schedule().page_size,
        sliding_window_size=None,
        spec_algorithm=algorithm,
        is_draft_worker=False,
        post_capture_kv_active=False,  # SGLang's default: it is off unless a variable asks for it
        spec_aux_config=SpecAuxHiddenStateConfig(),
        is_hybrid_swa=config.is_hybrid_swa,
        is_hybrid_swa_compress=config.is_hybrid_swa_compress,
        use_mla_backend=False,
        layer_info=resolve_layer_indices(model=model, model_config=config, is_draft_worker=False),
        forward_stream=None,
        req_to_token_pool=None,
        token_to_kv_pool_allocator=None,
        memory_pool_config=None,
    )
