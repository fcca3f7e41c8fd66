"""The one file that imports vLLM: its names under ours, probes of what it can do, and the translation of its metadata.

To bring the plugin to a new vLLM, start here (``docs/porting.md``). ``SUPPORTED`` is the tested range; a probe asks for
a capability, never for a version, and says which version needs it.
"""

from __future__ import annotations

import dataclasses
import inspect

import torch
import vllm.model_executor.layers.mamba.short_conv  # noqa: F401  (registers torch.ops.vllm.short_conv)
from vllm import __version__ as vllm_version
from vllm import envs
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationMode, ModelConfig, VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.utils import get_pp_indices
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path, is_in_target_modules
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.checkpoint import (
    MambaPrefillCheckpointBuilder,
    MambaPrefillCheckpointMetadata,
)
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFunc,
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
    is_conv_state_dim_first,
)
from vllm.model_executor.layers.mamba.ops.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_update,
)
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    _place_kernel_tensors as place_kernel_tensors,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import (
    EagleModelMixin,
    HasInnerState,
    IsHybrid,
    MixtureOfExperts,
    SupportsEagle,
    SupportsEagle3,
    SupportsLoRA,
    SupportsPP,
    SupportsQuant,
)
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    WeightsMapper,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.triton_utils import HAS_TRITON
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.short_conv_attn import (
    ShortConvAttentionBackend,
    ShortConvAttentionMetadata,
    ShortConvAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.kv_cache_interface import MambaSpec

from vllm_model import SUPPORTED

__all__ = [
    "NULL_BLOCK_ID",
    "SUPPORTED",
    "Attention",
    "CPUUnquantizedExperts",
    "CommonAttentionMetadata",
    "EagleModelMixin",
    "FusedMoEConfig",
    "FusedMoEFactory",
    "FusedMoEMethodBase",
    "GateLinear",
    "HasInnerState",
    "InputProcessor",
    "IntermediateTensors",
    "IsHybrid",
    "LRUCacheWorkerLoRAManager",
    "LoRAAdapterNotFoundError",
    "LoRAExpertsMixin",
    "LoRALayerWeights",
    "LoRAModel",
    "LoRARequest",
    "LogitsProcessor",
    "MambaAttentionBackendEnum",
    "MambaBase",
    "MambaPrefillCheckpointBuilder",
    "MambaPrefillCheckpointMetadata",
    "MambaSpec",
    "MambaStateCopyFunc",
    "MergedColumnParallelLinear",
    "MixtureOfExperts",
    "ModelConfig",
    "PPMissingLayer",
    "PackedLoRALayerWeights",
    "ParallelLMHead",
    "QKVParallelLinear",
    "QuantizationConfig",
    "RMSNorm",
    "RoutedExperts",
    "RowParallelLinear",
    "ShortConvAttentionBackend",
    "ShortConvAttentionMetadata",
    "ShortConvAttentionMetadataBuilder",
    "SiluAndMul",
    "SupportsEagle",
    "SupportsEagle3",
    "SupportsLoRA",
    "SupportsPP",
    "SupportsQuant",
    "UnquantizedEmbeddingMethod",
    "UnquantizedFusedMoEMethod",
    "UnquantizedLinearMethod",
    "UnquantizedMoeBackend",
    "VllmConfig",
    "VocabParallelEmbedding",
    "WeightsMapper",
    "captures_graphs",
    "captures_whole_steps",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "conv_copy_funcs",
    "conv_state_dtypes",
    "conv_state_shape",
    "default_weight_loader",
    "device_type",
    "expert_ranks",
    "extract_layer_index",
    "found_no_kernel",
    "get_adapter_absolute_path",
    "get_forward_context",
    "get_layerwise_info",
    "get_pp_group",
    "get_rope",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "init_logger",
    "is_conv_state_dim_first",
    "is_in_target_modules",
    "kv_connectors",
    "largest_capture",
    "make_empty_intermediate_tensors_factory",
    "make_layers",
    "maybe_prefix",
    "missing_capabilities",
    "on_cpu",
    "padding_rows",
    "pipeline_needs_compilation",
    "pipeline_stages",
    "place_kernel_tensors",
    "quantiser_is_there",
    "short_conv_op",
    "speculation_needs_triton",
    "support_torch_compile",
    "vllm_version",
]


def on_cpu() -> bool:
    """Whether this vLLM runs its models on a CPU."""
    return current_platform.is_cpu()


def device_type() -> str:
    """What torch calls the device that this vLLM runs its models on."""
    return current_platform.device_type


def captures_graphs() -> bool:
    """Whether this vLLM runs its models on a device whose work can be captured in graphs."""
    return current_platform.support_static_graph_mode()


def captures_whole_steps(vllm_config: VllmConfig) -> bool:
    """Whether decodes run as CUDA graphs that have the convolutions in them.

    The mode is settled late, by default on one that has them.
    """
    mode = vllm_config.compilation_config.cudagraph_mode
    return (
        captures_graphs()
        and not vllm_config.model_config.enforce_eager
        and (mode is None or mode.has_full_cudagraphs())
    )


def largest_capture() -> int:
    """The most sequences that vLLM captures decodes of by default, where so many may run: more on newer GPUs."""
    return 1024 if current_platform.is_device_capability_family(100) else 512


def missing_capabilities() -> list[str]:
    """What this vLLM lacks of what the package builds on, in words; empty where all is there.

    An import that fails says so by itself; these are the options and fields behind the names. All are in 0.32.0 and
    0.33.0.
    """
    factory = inspect.signature(FusedMoEFactory).parameters
    spec = {field.name for field in dataclasses.fields(MambaSpec)}
    metadata = {field.name for field in dataclasses.fields(ShortConvAttentionMetadata)}
    needs = {
        "a routing function of the model's own for experts": "custom_routing_function" in factory,
        "expert weights of the model's own class": "routed_experts_cls" in factory,
        "prefill checkpoints": "num_prefill_checkpoint_blocks" in spec,
        "state blocks for drafts that can be declined": "num_speculative_blocks" in spec,
        "metadata split into decodes and prefills": {
            "state_indices_tensor_d",
            "state_indices_tensor_p",
            "has_initial_states_p",
            "num_accepted_tokens",
        }
        <= metadata,
        "the operator vllm::short_conv": hasattr(torch.ops.vllm, "short_conv"),
    }
    return [need for need, met in needs.items() if not met]


def short_conv_op(bcx: torch.Tensor, out: torch.Tensor, layer_name: str) -> None:
    """Run the short convolution of the layer registered as ``layer_name``: reads bcx (T, 3D), writes out (T, D).

    This is vLLM's own operator. It looks the layer up in the forward context and calls its ``forward_native`` on a CPU,
    its ``forward_cuda`` elsewhere; vLLM knows it as a place to split a compiled graph, which an operator under another
    name would have to be told.
    """
    torch.ops.vllm.short_conv(bcx, out, layer_name)


def padding_rows(num_tokens: int) -> torch.Tensor | None:
    """(num_tokens,) bool, True where the running step has padding; None where it has none, no step runs, or the user
    has said with ``VLLM_MOE_SKIP_PADDING=0`` that padding is routed as tokens are: vLLM then leaves its mask unwritten.
    """
    if not envs.VLLM_MOE_SKIP_PADDING or not is_forward_context_available():
        return None
    mask = get_forward_context().is_padding
    return None if mask is None else mask[:num_tokens]


def pipeline_stages(vllm_config: VllmConfig, num_layers: int) -> list[tuple[int, int]]:
    """The half-open range of layers of each pipeline stage, first stage first."""
    size = vllm_config.parallel_config.pipeline_parallel_size
    return [get_pp_indices(num_layers, rank, size) for rank in range(size)]


def expert_ranks(vllm_config: VllmConfig) -> int:
    """Over how many ranks the experts of a layer are spread; 1 without expert parallelism."""
    parallel = vllm_config.parallel_config
    if not parallel.enable_expert_parallel:
        return 1
    return (
        parallel.tensor_parallel_size
        * parallel.data_parallel_size
        * parallel.prefill_context_parallel_size
    )


def kv_connectors(vllm_config: VllmConfig) -> dict[str, bool]:
    """The connectors that move cache blocks out of the engine, and whether each knows caches of several kinds.

    vLLM turns ``--kv-offloading-size`` into a connector later than it asks for refusals, so that is one here too.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        if vllm_config.cache_config.kv_offloading_size is None:
            return {}
        native = vllm_config.cache_config.kv_offloading_backend == "native"
        return {"OffloadingConnector": True} if native else {"LMCacheMPConnector": False}
    inner = transfer.kv_connector_extra_config.get("connectors") or []
    names = [transfer.kv_connector, *(each["kv_connector"] for each in inner)]
    knows = KVConnectorFactory.supports_hma_config(transfer)
    return dict.fromkeys(names, knows)


def conv_state_shape(vllm_config: VllmConfig, channels: int, width: int) -> tuple[int, int]:
    """One slot's shape for ``channels`` (before tensor parallelism) and a convolution of ``width``, drafts included."""
    (shape,) = MambaStateShapeCalculator.short_conv_state_shape(
        tp_world_size=vllm_config.parallel_config.tensor_parallel_size,
        intermediate_size=channels,
        conv_kernel=width,
        num_spec=vllm_config.num_speculative_tokens,
    )
    return shape


def conv_state_dtypes(vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
    """The state's dtype: the model's, or what ``--mamba-cache-dtype`` says."""
    return MambaStateDtypeCalculator.short_conv_state_dtype(
        vllm_config.model_config.dtype, vllm_config.cache_config.mamba_cache_dtype
    )


def conv_copy_funcs() -> tuple[MambaStateCopyFunc, ...]:
    """How vLLM copies a state between slots; a page of several layers is one wide state, so there is one function."""
    return MambaStateCopyFuncCalculator.short_conv_state_copy_func()


def speculation_needs_triton(vllm_config: VllmConfig) -> bool:
    """Whether a step would call Triton kernels of the runner that aren't there: drafts with an aligned cache."""
    return (
        not HAS_TRITON
        and vllm_config.num_speculative_tokens > 0
        and vllm_config.cache_config.mamba_cache_mode == "align"
    )


def pipeline_needs_compilation(vllm_config: VllmConfig) -> bool:
    """Whether a later pipeline stage would have no buffer for what the one before sends.

    vLLM's runner makes it in the dummy run before compiling, which on a CPU without compilation never happens. The mode
    is settled late, so what the user says of it counts too.
    """
    eager = vllm_config.model_config.enforce_eager
    return (
        on_cpu()
        and vllm_config.parallel_config.pipeline_parallel_size > 1
        and (eager or vllm_config.compilation_config.mode == CompilationMode.NONE)
    )


def found_no_kernel(method: FusedMoEMethodBase) -> bool:
    """Whether vLLM looked for a kernel for these experts in vain. For FP8 and MXFP4 on a CPU it takes note of that, and
    fails when all weights are there.
    """
    return getattr(method, "experts_cls", method) is None


def quantiser_is_there(quant_config: QuantizationConfig | None) -> bool:
    """Whether vLLM can quantise as it loads, where ``quant_config`` asks for that: its builds for CPUs declare the
    operator without arguments, and fail in the first layer.
    """
    if quant_config is None or quant_config.get_name() != "online":
        return True
    return bool(torch.ops._C.static_scaled_fp8_quant.default._schema.arguments)
