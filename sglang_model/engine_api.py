"""The one file that imports SGLang: its names under ours, probes of its abilities, the translation of its metadata.

To bring the plugin to a new SGLang, start here (``docs/porting.md``). ``SUPPORTED`` is the tested range; a probe asks
for a capability, never for a version, and says which version needs it.

A name is looked up in SGLang when it is first asked for. SGLang reads its platform, ours among them, while the
modules that most of the names come from are being imported, and several of its processes (launcher, detokenizer) need
few of them.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lfm2_plugin.checkpoint.readers import holds_weights
from lfm2_plugin.conv_batch import ConvBatch

from .engine_names import NAMES

if TYPE_CHECKING:
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from transformers import Lfm2MoeConfig as HuggingFaceConfig


def __getattr__(name: str) -> Any:
    """The name of SGLang behind ours, kept from then on."""
    if name not in NAMES:
        raise AttributeError(f"sglang_model.engine_api has no {name!r}")
    module, _, attribute = NAMES[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def register_hybrid_model(config_class: type, state_backend: str, hybrid_backend: str) -> None:
    """Tell SGLang of a model with conv states: its config class and the backend that keeps the states.

    By the class alone, not by the architecture's name, which SGLang's own model has as well.

    Args:
        config_class: of the model's config; see :func:`read_configs_as`.
        state_backend: ``module.Class`` of the backend.
        hybrid_backend: ``module.Class`` of the pair of an attention backend and that one.
    """
    from sglang.srt.configs.linear_attn_model_registry import (
        LinearAttnModelSpec,
        register_linear_attn_model,
    )

    register_linear_attn_model(
        LinearAttnModelSpec(
            config_class=config_class,
            backend_class_name=state_backend,
            uses_mamba_radix_cache=True,
            support_mamba_cache=True,
            support_mamba_cache_extra_buffer=snapshots_can_run(),
            hybrid_backend_class_name=hybrid_backend,
        )
    )


def read_configs_as(config_class: type | None) -> None:
    """Have SGLang read a config.json of LFM2-MoE as this class from now on; None brings its own back.

    SGLang keeps the configs that it has read, so they are forgotten.
    """
    from sglang.srt.configs.lfm2_moe import Lfm2MoeConfig  # which registers itself when imported
    from sglang.srt.utils.hf_transformers.config import get_config
    from transformers import AutoConfig

    AutoConfig.register(Lfm2MoeConfig.model_type, config_class or Lfm2MoeConfig, exist_ok=True)
    get_config.cache_clear()


def snapshots_can_run() -> bool:
    """Whether SGLang's scheduler can have states kept on their way ("extra_buffer") on this machine.

    Needed for 0.5.22, whose scheduler makes a pinned tensor in every step for that, which torch refuses without an
    accelerator; 0.5.23 gathers the slots on the device. There the prefix cache takes running states ("no_buffer"), and
    the overlap scheduler is off.
    """
    if torch.accelerator.is_available():
        return True
    from sglang.srt.managers import schedule_batch

    return hasattr(schedule_batch, "_gather_mamba_track_indices")


def platforms_bring_workers() -> bool:
    """Whether a platform may have a worker of its own for drafts. Needed for 0.5.22, where it may not."""
    from sglang.srt.platforms.interface import SRTPlatform

    return hasattr(SRTPlatform, "get_speculative_worker_cls")


def prefill_graphs_are_wanted() -> bool:
    """Whether the user asks for CUDA graphs of prefills with gaps (``--cuda-graph-backend-prefill breakable``).

    Needed for 0.5.22, whose graphs can have no layers without attention.
    """
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup
    from sglang.srt.runtime_context import get_server_args

    said = said_by_user(get_server_args(), "cuda_graph_backend_prefill")
    return said == "breakable" and hasattr(cuda_graph_setup, "has_hybrid_graph_handlers")


def in_prefill_graph(forward_batch: ForwardBatch) -> bool:
    """Whether this step is a prefill that SGLang captures or replays as graphs with gaps."""
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
        is_in_breakable_cuda_graph,
    )
    from sglang.srt.model_executor.runner_utils.prefill_graph import is_in_prefill_graph_scope

    return (
        is_in_prefill_graph_scope()
        and is_in_breakable_cuda_graph()
        and forward_batch.forward_mode.is_extend_without_speculative()
    )


def conv_state_dtype_of_user() -> torch.dtype | None:
    """The dtype that the user asked for with ``SGLANG_MAMBA_CONV_DTYPE``; None if unset."""
    from sglang.srt.configs.mamba_utils import mamba2_state_dtype

    return mamba2_state_dtype().conv if "SGLANG_MAMBA_CONV_DTYPE" in os.environ else None


def conv_cache_params(
    channels: int, width: int, layers: tuple[int, ...], dtype: torch.dtype
) -> Any:
    """SGLang's description of the states: (channels per rank, width - 1) for each of ``layers``, nothing else."""
    from sglang.srt.configs.mamba_utils import (
        Mamba2CacheParams,
        Mamba2StateDType,
        Mamba2StateShape,
    )
    from sglang.srt.runtime_context import get_parallel

    try:
        ranks = get_parallel().attn_tp_size
    except (AssertionError, RuntimeError):  # asked before the process groups exist
        ranks = 1
    shape = Mamba2StateShape.create(
        tp_world_size=ranks,
        intermediate_size=channels,
        n_groups=1,
        num_heads=ranks,  # the recurrent state beside the convolution's, which has no elements
        head_dim=channels,
        state_size=0,
        conv_kernel=width,
    )
    return Mamba2CacheParams(
        shape=shape,
        layers=list(layers),
        dtype=Mamba2StateDType(conv=dtype, temporal=torch.float32),
    )


def rotary_embedding(head_dim: int, max_position: int, rope: dict[str, Any]) -> torch.nn.Module:
    """SGLang's rotary embedding for the nested rope settings of :class:`lfm2_plugin.arch.Lfm2MoeArch`.

    SGLang has no eye for yarn's ``attention_factor``, the scale of sines and cosines; it multiplies a scale of its own
    with another setting, ``attn_factor``, which is made so that the product is what the config says.
    """
    from sglang.srt.layers.rotary_embedding import get_rope

    if "attention_factor" in rope:
        rope = dict(rope)
        own = 0.1 * math.log(rope["factor"]) + 1.0
        rope["attn_factor"] = rope.pop("attention_factor") / own
    return get_rope(
        head_size=head_dim,
        rotary_dim=head_dim,
        max_position=max_position,
        base=rope["rope_theta"],
        is_neox_style=True,
        rope_scaling=None if rope["rope_type"] == "default" else rope,
        dtype=torch.get_default_dtype(),
    )


def bind_experts_to_routing(topk: TopK, experts: FusedMoE) -> None:
    """Let the routing know which expert kernels will read it.

    Needed from 0.5.23 on, where a routing that was never bound raises at its first call; absent before.

    Raises:
        ValueError: the kernels route by themselves.
    """
    bind = getattr(topk, "bind_runner_backend", None)
    if bind is None:
        return
    backend = experts.runner_backend
    if backend is not None and backend.is_triton_kernels():
        raise ValueError(
            "--moe-runner-backend triton_kernel chooses experts by a softmax and without LFM2-MoE's selection bias: it "
            "would give other tokens. Leave the option out, or choose triton."
        )
    bind(backend)


def checkpoint_folder(config: HuggingFaceConfig) -> Path | None:
    """The local folder that the weights of ``config`` will be read from; None if there is none."""
    from sglang.srt.runtime_context import get_model, get_server_args

    if get_model().load_format not in ("auto", "safetensors", "pt"):
        return None
    folder = Path(getattr(config, "_name_or_path", "") or get_server_args().model_path)
    return folder if holds_weights(folder) else None


def kv_cache_is_quantised() -> bool:
    """Whether keys and values are kept in fewer bits than the model's dtype has."""
    from sglang.srt.runtime_context import get_server_args

    return get_server_args().kv_cache_dtype not in ("auto", "bf16", "bfloat16")


def add_attention_choice(name: str) -> None:
    """Let ``--attention-backend`` take ``name``; safe to call again."""
    from sglang.srt.arg_groups.choices import (
        ATTENTION_BACKEND_CHOICES,
        add_attention_backend_choices,
    )

    if name not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([name])


def said_by_user(server_args: Any, option: str) -> Any:
    """What the user set ``option`` to, None if nothing, whatever SGLang has filled in since."""
    return (getattr(server_args, "_raw_input", None) or {}).get(option)


def without_cuda_graphs(config: Any) -> Any:
    """SGLang's settled configuration of CUDA graphs, with none captured, whatever the user said."""
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    for phase in Phase.ALL:
        config = with_phase(config, phase, backend=Backend.DISABLED)
    return config


def with_decode_graphs(server_args: Any, config: Any, largest: int) -> Any:
    """SGLang's settled configuration of CUDA graphs, with decodes of up to ``largest`` requests, in SGLang's steps."""
    from sglang.srt.arg_groups.cuda_graph_hook import generate_decode_cuda_graph_batch_sizes
    from sglang.srt.model_executor.cuda_graph_config import Phase, with_phase

    sizes = generate_decode_cuda_graph_batch_sizes(server_args, largest)
    return with_phase(config, Phase.DECODE, max_bs=largest, bs=sizes)


def register_cpu_attention(name: str) -> None:
    """Let SGLang build the attention backend ``name`` from ``cpu_attention.py``; safe to call again."""
    from sglang.srt.layers.attention.attention_registry import (
        ATTENTION_BACKENDS,
        register_attention_backend,
    )

    if name not in ATTENTION_BACKENDS:

        @register_attention_backend(name)
        def create(runner: Any) -> Any:
            from .cpu_attention import CpuAttentionBackend

            return CpuAttentionBackend(runner)


def register_cpu_experts(platform_key: str) -> None:
    """Run unquantised experts through ``cpu_experts.py`` on the platform of that key."""
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

    from .cpu_experts import experts_forward

    BaseFusedOp.register_oot_forward(UnquantizedFusedMoEMethod, experts_forward, platform_key)


def register_cpu_lora(name: str) -> None:
    """Let ``--lora-backend`` mean the backend of ``cpu_lora.py`` by ``name``; safe to call again."""
    from sglang.srt.lora.backend.lora_registry import register_lora_backend

    @register_lora_backend(name)
    def create() -> type:
        from .cpu_lora import CpuLoRABackend

        return CpuLoRABackend


def uses_plain_attention(layer: RadixAttention) -> bool:
    """Whether the layer is causal attention over all earlier tokens, keys and values of one width."""
    from sglang.srt.layers.radix_attention import AttentionType

    return (
        layer.attn_type == AttentionType.DECODER
        and not layer.is_cross_attention
        and layer.sliding_window_size <= -1
        and not layer.logit_cap
        and layer.qk_head_dim == layer.v_head_dim
    )


def write_kv(
    pool: Any, layer: RadixAttention, places: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Write keys and values (T, G * P) of a step to ``places`` (T,) of the cache."""
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    pool.set_kv_buffer(layer, KVWriteLoc(places, None), k, v)


def conv_batch_from(
    slots: torch.Tensor,
    query_start: torch.Tensor,
    forward_batch: ForwardBatch,
    always: torch.Tensor,
) -> ConvBatch:
    """SGLang's metadata of a step as a :class:`ConvBatch`; ``docs/contracts.md`` has the table.

    A step of SGLang either decodes for every sequence, or extends every sequence; a decode that is mixed into an
    extending step is an extension by one token.

    Args:
        slots: (S,) the state slot of each sequence; -1 marks padding of a captured graph.
        query_start: (S + 1,) where each sequence's tokens start.
        forward_batch: the step.
        always: (S,) True. It, ``slots`` and ``query_start`` of a decode that a CUDA graph captures stay where they are.
    """
    mode = forward_batch.forward_mode
    sequences = slots.shape[0]
    if mode.is_decode():
        return ConvBatch(
            slots=slots,
            query_start=query_start,
            has_initial_state=always,
            num_decodes=sequences,
            num_decode_tokens=sequences,
            num_prefills=0,
            num_prefill_tokens=0,
        )
    offsets, checkpoints = tracked_prefills(forward_batch) or (None, None)
    return ConvBatch(
        slots=slots,
        query_start=query_start,
        has_initial_state=forward_batch.extend_prefix_lens > 0,
        num_decodes=0,
        num_decode_tokens=0,
        num_prefills=sequences,
        num_prefill_tokens=_extended_tokens(query_start, forward_batch),
        checkpoint_offsets=offsets,
        checkpoint_slots=checkpoints,
    )


def tracked_prefills(forward_batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor] | None:
    """After how many tokens of its query each sequence's state is kept for the prefix cache, 0 for none, and in which
    slots, (S,) each; None in a step that keeps none.
    """
    aligned = forward_batch.mamba_track_aligned_lens()
    if aligned is None or forward_batch.mamba_track_indices is None:
        return None
    offsets = aligned.masked_fill(~forward_batch.mamba_track_mask, 0)
    return offsets, forward_batch.mamba_track_indices


def _extended_tokens(query_start: torch.Tensor, forward_batch: ForwardBatch) -> int:
    lengths = forward_batch.extend_seq_lens_cpu
    return sum(lengths) if lengths is not None else int(query_start[-1])


def missing_capabilities() -> list[str]:
    """What this SGLang lacks of what the package builds on, in words; empty where all is there."""
    from sglang.srt.configs.linear_attn_model_registry import LinearAttnModelSpec
    from sglang.srt.layers.moe.topk import TopK

    spec = inspect.signature(LinearAttnModelSpec).parameters
    topk = inspect.signature(TopK).parameters
    needs = {
        "snapshots of conv states beside the overlap scheduler": (
            "support_mamba_cache_extra_buffer" in spec
        ),
        "a hybrid attention backend of the model's own": "hybrid_backend_class_name" in spec,
        "a routing function of the model's own for experts": "custom_routing_function" in topk,
    }
    return [need for need, met in needs.items() if not met]
