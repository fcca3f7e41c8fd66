"""What SGLang is told about LFM2-MoE before it reads its options: the config, the state backend, the defaults."""

from __future__ import annotations

from typing import Any

from .config import Lfm2MoeConfig
from .engine_api import register_hybrid_model, register_model_override, resolving_view

ARCHITECTURE = "Lfm2MoeForCausalLM"
STATE_BACKEND = "sglang_model.conv_state.ConvStateBackend"

REQUEST_TOKENS = 1536
"""The request that memory is divided for: 1,024 tokens of prompt and 512 of answer, Liquid's own measure."""
SLOTS_PER_REQUEST = 5
"""State slots that SGLang reckons with for a request: running, two snapshots in turn, and two in the prefix cache."""
TRACK_INTERVAL = 16
"""Decoded tokens between two snapshots. SGLang's 256 is meant for states of megabytes; these are 240 KiB (24B)."""

_declared = False


def declare() -> None:
    """Register everything with SGLang, once a process; safe to call again."""
    global _declared
    if _declared:
        return
    _declared = True
    register_hybrid_model(Lfm2MoeConfig, ARCHITECTURE, STATE_BACKEND)
    register_model_override(ARCHITECTURE)(server_defaults)


def server_defaults(server_args: Any, hf_config: Any) -> dict[str, Any]:
    """Options that SGLang leaves at values made for other models; what the user says stays.

    SGLang's default gives 47 % of the memory to states, enough for 38 times the requests whose keys and values fit into
    the rest.
    """
    options = resolving_view(server_args)
    chosen: dict[str, Any] = {}
    if options.mamba_full_memory_ratio is None:
        chosen["mamba_full_memory_ratio"] = state_memory_ratio(hf_config)
    return chosen


def state_memory_ratio(config: Lfm2MoeConfig) -> float:
    """Bytes of state for each byte of keys and values, such that both last for the same number of requests."""
    params = config.mamba2_cache_params
    arch = config.arch
    state = SLOTS_PER_REQUEST * params.mamba_cache_per_req
    keys_and_values = REQUEST_TOKENS * arch.kv_bytes_per_token(params.dtype.conv)
    return round(state / max(keys_and_values, 1), 4)
