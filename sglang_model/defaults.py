"""What SGLang is told about LFM2-MoE before it reads its options: the config, the state backend, the defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .config import Lfm2MoeConfig
from .engine_api import (
    conv_state_dtype_of_user,
    declare_resolution,
    model_config_of,
    read_configs_as,
    register_hybrid_model,
    register_resolution_hook,
    resolving_view,
    said_by_user,
)
from .graphs import settle_graphs
from .memory import cpu_memory_options, memory_options
from .registration import HYBRID_BACKEND, SOURCE, STATE_BACKEND
from .speculation import settle_drafts

LAST_STEP = "handle_model_capability_adjustments"
"""The step of SGLang's resolution of options after which everything that our defaults depend on is settled."""

_declared = False


def declare() -> None:
    """Register everything with SGLang, once a process, and have it read our config; safe to call again.

    All that is registered counts for configs of our class alone, so :func:`withdraw` has little to do.
    """
    global _declared
    if not _declared:
        register_hybrid_model(Lfm2MoeConfig, STATE_BACKEND, HYBRID_BACKEND)
        register_resolution_hook("handle_speculative_decoding")(settle_drafts)
        register_resolution_hook("handle_gpu_memory_settings")(settle_graphs)
        register_resolution_hook(LAST_STEP)(settle_memory)
        _declared = True
    read_configs_as(Lfm2MoeConfig)


def withdraw() -> None:
    """Leave the next engine of this process to SGLang's own model."""
    read_configs_as(None)


def settle_memory(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Options that SGLang leaves at values made for other models; what the user says stays.

    Not a model override (``register_model_override``): these come before the number of requests is settled, and may not
    set the number of slots.

    Raises:
        UnsupportedConfig: the model's configuration is not one of LFM2-MoE.
        ImpossibleChoice: ``LFM2_PLUGIN_OPS`` asks for what can't run here.
    """
    previous(server_args)
    model = model_config_of(server_args)
    if not isinstance(model.hf_config, Lfm2MoeConfig):
        return
    from .support import check_operators  # imports layers, which no other model's launcher needs

    state_dtype = conv_state_dtype_of_user() or model.dtype
    options = resolving_view(server_args)
    check_operators(options)
    chosen = memory_options(options, model.hf_config.arch, model.dtype, state_dtype)
    if said_by_user(server_args, "mem_fraction_static") is None:
        chosen |= cpu_memory_options(options, model.context_len)
    declare_resolution(
        server_args, SOURCE, **chosen
    )  # nothing, too: ``registration.py`` looks for it
