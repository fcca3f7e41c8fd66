"""How SGLang's memory is divided between conv states and keys and values, where the user doesn't say.

SGLang's own default is made for models whose states are megabytes: 47 % of the memory. A state of LFM2-24B-A2B costs as
much as the keys and values of 12 tokens, so that share holds 38 times the requests whose keys and values fit beside it.
``docs/memory-sglang.md`` has the figures. On a CPU it would take nearly all memory that is free, which is not a GPU's
to take: other programs live there.
"""

from __future__ import annotations

from typing import Any

import torch

from lfm2_plugin.arch import Lfm2MoeArch

REQUEST_TOKENS = 1536
"""The request that memory is divided for: 1,024 tokens of prompt and 512 of answer, Liquid's own measure."""
PREFIX_SLOTS = 512
"""Slots for the prefix cache beside those of the requests, where their number is known (120 MiB for 24B).

Few requests at a time leave most keys and values to the prefix cache, which serves a prefix only with its state.
"""

PLAIN_SLOTS = 3
"""SGLang's share of a request without snapshots: its running state, and two for what it leaves in the prefix cache."""

CPU_REQUEST_TOKENS = 4096
"""Keys and values that are kept on a CPU for each request at once, tokens: 3 GiB for 64 requests of the 8B."""


def slots_per_request(options: Any) -> int:
    """State slots that SGLang reckons with for a running request, by its settled options.

    The engine's count (``KVCacheConfigurator._calculate_mamba_ratio``) is for schedulers only; a test compares.
    """
    if options.disable_radix_cache:
        return 1
    strategy = options.mamba_radix_cache_strategy
    if strategy == "no_buffer":
        return PLAIN_SLOTS
    # Snapshots are written in turn into two slots: a step that is still in flight may not find its own overwritten.
    one_snapshot = strategy == "extra_buffer_lazy" or options.disable_overlap_schedule
    return PLAIN_SLOTS + (1 if one_snapshot else 2)


def memory_options(
    options: Any, arch: Lfm2MoeArch, dtype: torch.dtype, state_dtype: torch.dtype
) -> dict[str, Any]:
    """The options that divide the memory; none where the user has set one of them.

    Args:
        options: SGLang's, settled but for these.
        arch: the model's shape.
        dtype: of the model.
        state_dtype: of the conv states.

    Returns:
        ``max_mamba_cache_size`` (slots) where it is known how many requests run at once, ``mamba_full_memory_ratio``
        (bytes of state for each byte of keys and values) where memory decides that.
    """
    if options.mamba_full_memory_ratio is not None or options.max_mamba_cache_size is not None:
        return {}
    slots, requests = slots_per_request(options), options.max_running_requests
    if requests is None:
        kv_dtype = kv_cache_dtype(options.kv_cache_dtype, dtype)
        return {"mamba_full_memory_ratio": state_memory_ratio(arch, slots, state_dtype, kv_dtype)}
    if options.disable_radix_cache:
        return {}  # SGLang then makes a slot for each request
    return {"max_mamba_cache_size": slots * requests + PREFIX_SLOTS}


def cpu_memory_options(options: Any, context: int) -> dict[str, Any]:
    """How many tokens' keys and values are kept on a CPU; nothing on a GPU, or where the user bounds them.

    Args:
        options: SGLang's, settled.
        context: longest request that the model serves, tokens.

    Returns:
        ``max_total_tokens``: enough for one request of the whole context. SGLang lowers it to what fits.
    """
    if options.device != "cpu" or options.max_total_tokens is not None:
        return {}
    requests = options.max_running_requests or 1
    return {"max_total_tokens": max(context, requests * min(context, CPU_REQUEST_TOKENS))}


def state_memory_ratio(
    arch: Lfm2MoeArch, slots: int, state_dtype: torch.dtype, kv_dtype: torch.dtype
) -> float:
    """Bytes of state for each byte of keys and values, such that both last for the same number of requests."""
    keys_and_values = REQUEST_TOKENS * arch.kv_bytes_per_token(kv_dtype)
    return slots * arch.conv_state_bytes(state_dtype) / max(keys_and_values, 1)


def kv_cache_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What ``--kv-cache-dtype`` means for a model of ``dtype``. Four bits count as eight: their scales come on top."""
    if name == "auto":
        return dtype
    return torch.bfloat16 if name in ("bf16", "bfloat16") else torch.float8_e4m3fn
