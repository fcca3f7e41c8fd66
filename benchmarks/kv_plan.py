"""One KV cache plan: a model without weights, its layers' specs, vLLM's planner run on them.

Runs in a process where vLLM can be imported; which model class is built is settled when that
process starts (``LFM2_PLUGIN=off`` gives the built-in). Nothing here computes a page or a state
size: the sizes come from the layers of the model that the engine itself resolves, the page
alignment and the number of blocks from vLLM's own code.

Only two things are set by hand, as this has to run on machines without a GPU: the memory that is
free for the cache, and the attention backend that the page alignment looks at
(:class:`_GpuSizing`).
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

import torch
from vllm import EngineArgs
from vllm.config import VllmConfig, get_layers_from_vllm_config, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.utils import (
    get_supported_kv_cache_layouts,
    resolve_kv_cache_layout,
)
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec, MambaSpec

from benchmarks.kv_held import held
from benchmarks.memory import Case, Plan
from benchmarks.models import model_folder

try:  # where vLLM 0.33 has it; there the groups are settled first, and handed in
    from vllm.v1.core.kv_cache_planning import get_global_kv_cache_groups, get_kv_cache_configs
except ModuleNotFoundError:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    get_global_kv_cache_groups = None

GIB = 2**30


class _GpuSizing(type(current_platform)):  # type: ignore[misc]
    """The platform of this machine, except that block sizes are chosen for FlashAttention.

    vLLM's CPU attention takes blocks of 32 tokens and more, FlashAttention 16; the alignment of
    pages is the platform's inherited code, unchanged.
    """

    @classmethod
    def _find_non_ssm_backends(cls, vllm_config: VllmConfig) -> list[type[AttentionBackend]]:
        return [FlashAttentionBackend]


@cache
def _single_process_groups() -> None:
    """Start torch.distributed for one process: the engine's layers ask for their ranks."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rendezvous = tempfile.mktemp(prefix="kv-plan-")
    init_distributed_environment(1, 0, f"file://{rendezvous}", 0, backend="gloo")
    ensure_model_parallel_initialized(1, 1)


def _engine_config(case: Case, folder: Path) -> VllmConfig:
    speculation = None
    if case.drafts:
        speculation = {
            "method": "ngram",
            "num_speculative_tokens": case.drafts,
            "prompt_lookup_max": 3,
        }
    return EngineArgs(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=case.tokens,
        block_size=case.block_size,
        kv_cache_dtype=case.kv_dtype,
        enable_prefix_caching=case.cache_mode != "none",
        speculative_config=speculation,
        max_num_batched_tokens=case.step_tokens or None,
    ).create_engine_config()


def _build(config: VllmConfig) -> torch.nn.Module:
    """The model that the engine resolves, on the meta device: shapes without storage."""
    cache_config = config.cache_config
    mode = cache_config.mamba_cache_mode
    if config.speculative_config:
        # Ours refuses speculation with the prefix cache on a CPU, where vLLM's runner cannot do it. No GPU step is run
        # here: the layers are asked for their specs after the mode is back in its place.
        cache_config.mamba_cache_mode = "none"
    with set_current_vllm_config(config):
        _single_process_groups()
        with torch.device("meta"), set_default_torch_dtype(torch.bfloat16):
            model = initialize_model(config)
    cache_config.mamba_cache_mode = mode
    return model


def _specs(config: VllmConfig) -> dict[str, KVCacheSpec]:
    layers = get_layers_from_vllm_config(config, AttentionLayerBase)
    specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
    return {name: spec for name, spec in specs.items() if spec is not None}


def _resolve_layout(config: VllmConfig, specs: dict[str, KVCacheSpec]) -> None:
    """Settle the memory layout as the engine does, for FlashAttention and the conv backend."""
    layers = get_layers_from_vllm_config(config, AttentionLayerBase)
    conv = {layer.get_attn_backend() for layer in layers.values()}
    backends = [FlashAttentionBackend, *(backend for backend in conv if backend.is_ssm())]
    names = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
    resolve_kv_cache_layout(config, [names], list(specs.values()))


def _planned(config: VllmConfig, specs: dict[str, KVCacheSpec], free: int) -> KVCacheConfig:
    """What vLLM's planner makes of the layers' specs and ``free`` bytes, as in the engine's core."""
    groups = []
    if get_global_kv_cache_groups is not None:
        groups.append(get_global_kv_cache_groups(config, [specs]))
    return get_kv_cache_configs(config, [specs], [free], *groups)[0]


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all distinct parameters and buffers (tied ones once)."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def plan(case: Case) -> Plan:
    """Run vLLM's planner for one case.

    Raises:
        ValueError: the model's cache mode is not the one asked for, or nothing is left for the
            cache.

    """
    with tempfile.TemporaryDirectory() as temporary:
        folder, _ = model_folder(case.model, Path(temporary))
        config = _engine_config(case, folder)
        model = _build(config)
    if config.cache_config.mamba_cache_mode != case.cache_mode:
        raise ValueError(
            f"vLLM chose cache mode {config.cache_config.mamba_cache_mode!r}, "
            f"not {case.cache_mode!r}"
        )
    _GpuSizing._align_hybrid_block_size(config, FlashAttentionBackend)
    specs = _specs(config)
    _resolve_layout(config, specs)

    weights = weight_bytes(model)
    free = int((case.device_gib * case.utilisation - case.reserve_gib) * GIB) - weights
    if free <= 0:
        raise ValueError(f"{case.model}: {weights / GIB:.1f} GiB of weights leave no cache")
    kv = _planned(config, specs, free)

    conv, attention = [], []
    for group in kv.kv_cache_groups:
        spec = group.kv_cache_spec
        need = cdiv(spec.max_memory_usage_bytes(config), spec.page_size_bytes)
        (conv if isinstance(spec, MambaSpec) else attention).append(need)
    # Every tensor names the whole pool as its size: the groups overlay each other, a block id
    # belongs to one at a time.
    block_bytes = max(tensor.size for tensor in kv.kv_cache_tensors) // kv.num_blocks
    lives = held(config, kv, case.prompt, case.tokens - case.prompt)
    return Plan(
        model_class=f"{type(model).__module__}.{type(model).__qualname__}",
        weight_bytes=weights,
        cache_bytes=free,
        block_size=config.cache_config.block_size,
        block_bytes=block_bytes,
        num_blocks=kv.num_blocks,
        mamba_groups=len(conv),
        conv_blocks=sum(conv),
        conv_bytes=sum(conv) * block_bytes,
        peak_bytes=lives.peak * block_bytes,
        decoding_bytes=lives.decoding * block_bytes,
        prefill_steps=list(lives.prefill_steps),
        attention_blocks=sum(attention),
        # vLLM keeps one block back (the null block).
        requests=(kv.num_blocks - 1) // (sum(conv) + sum(attention)),
    )
