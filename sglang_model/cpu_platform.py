"""SGLang on a machine without an accelerator: a platform that any x86 or Arm CPU fulfils.

SGLang's own CPU engine needs the compiled package ``sgl_kernel``, which exists for few CPUs; without it the scheduler
can't be imported. As an out-of-tree platform the same scheduler runs on torch alone. It comes into effect by itself
only where there is neither an accelerator nor ``sgl_kernel`` (``lfm2_plugin/register.py`` decides), or when
``SGLANG_PLATFORM=lfm2_cpu`` asks for it.
"""

from __future__ import annotations

import gc
from typing import Any

import psutil
import torch

from .cpu_torch import let_memory_be_pinned, let_torchvision_import
from .engine_api import (
    PlatformEnum,
    SRTPlatform,
    add_attention_choice,
    register_cpu_attention,
    register_cpu_experts,
    register_cpu_lora,
    said_by_user,
    without_cuda_graphs,
)

ATTENTION_BACKEND = DISPATCH_KEY = LORA_BACKEND = "lfm2_cpu"
DEFAULT_LORA_BACKEND = "csgmv"  # SGLang's, for GPUs
MAX_RUNNING_REQUESTS = 64
"""More requests at once bring a few cores no more tokens a second, and every one takes memory."""


class PortableCpuPlatform(SRTPlatform):
    """One CPU as SGLang's device, memory in bytes, with batched torch code for attention and experts."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def __init__(self) -> None:
        # SGLang makes its platform before it imports torchvision.
        let_torchvision_import()
        let_memory_be_pinned()

    def init_backend(self) -> None:
        """In each worker, before a model is built."""
        register_cpu_attention(ATTENTION_BACKEND)
        register_cpu_experts(DISPATCH_KEY)
        register_cpu_lora(LORA_BACKEND)

    def post_load_model(self, model: torch.nn.Module) -> None:
        """Our model packs its weights; other models' weights stay as SGLang's updates expect them."""
        if hasattr(model, "serve_packed"):
            model.serve_packed()

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """What a user would have to say on a CPU; everything said otherwise stays."""
        add_attention_choice(ATTENTION_BACKEND)
        server_args.device = "cpu"
        # By now SGLang has chosen the backend of its own CPU kernels, which would fall back to plain torch.
        if said_by_user(server_args, "attention_backend") is None:
            server_args.attention_backend = ATTENTION_BACKEND
        if server_args.max_running_requests is None:
            server_args.max_running_requests = MAX_RUNNING_REQUESTS
        if server_args.lora_backend == DEFAULT_LORA_BACKEND:
            server_args.lora_backend = LORA_BACKEND
        server_args.disable_cuda_graph = True
        server_args.cuda_graph_config = without_cuda_graphs(server_args.cuda_graph_config)
        server_args.sleep_on_idle = True  # else an idle scheduler takes a whole core

    def get_speculative_worker_cls(self, algorithm: str) -> type | None:
        """Ours for n-gram drafts; SGLang refuses the algorithms that have a model for drafts."""
        if algorithm != "NGRAM":
            return None
        from .cpu_speculation import NgramWorker

        return NgramWorker

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """Ours for keys and values of heads."""
        if kind != "mha":
            return None
        from .cpu_kv_pool import CpuKVPool

        return CpuKVPool

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_dispatch_key_name(self) -> str:
        return DISPATCH_KEY

    def support_mamba_cache_extra_buffer(self) -> bool:
        """Our state backend writes the snapshots."""
        return True

    def get_device_total_memory(self, device_id: int = 0) -> int:
        return int(psutil.virtual_memory().total)

    def get_current_memory_usage(self, device: torch.device | None = None) -> float:
        """What the whole machine uses, since others' memory is no more to be had than ours."""
        memory = psutil.virtual_memory()
        return float(memory.total - memory.available)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def get_device(self, device_id: int = 0) -> str:
        return "cpu"

    def set_device(self, device: torch.device) -> None:
        """There is one."""

    def get_device_name(self, device_id: int = 0) -> str:
        return "cpu"

    def get_device_uuid(self, device_id: int = 0) -> str:
        return "cpu"

    def get_device_capability(self, device_id: int = 0) -> None:
        return None

    def empty_cache(self) -> None:
        gc.collect()

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back."""

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "inductor"
