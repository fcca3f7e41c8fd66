"""Where the names of SGLang that this package uses are: the table of ``engine_api.py``, which imports them."""

from __future__ import annotations

NAMES = {
    "BaseLoRABackend": "sglang.srt.lora.backend.base_backend:BaseLoRABackend",
    "BaseSpecWorker": "sglang.srt.speculative.base_spec_worker:BaseSpecWorker",
    "ConvCacheParams": "sglang.srt.configs.mamba_utils:Mamba2CacheParams",
    "ForwardBatch": "sglang.srt.model_executor.forward_batch_info:ForwardBatch",
    "ForwardMode": "sglang.srt.model_executor.forward_batch_info:ForwardMode",
    "FusedMoE": "sglang.srt.layers.moe.fused_moe_triton:FusedMoE",
    "FusedMoEWithLoRA": "sglang.srt.lora.layers:FusedMoEWithLoRA",
    "GenerationBatchResult": "sglang.srt.managers.utils:GenerationBatchResult",
    "HookRegistry": "sglang.srt.plugins.hook_registry:HookRegistry",
    "HookType": "sglang.srt.plugins.hook_registry:HookType",
    "HuggingFaceConfig": "transformers:Lfm2MoeConfig",
    "LoRAAdapter": "sglang.srt.lora.lora:LoRAAdapter",
    "LoRAManager": "sglang.srt.lora.lora_manager:LoRAManager",
    "LogitsProcessor": "sglang.srt.layers.logits_processor:LogitsProcessor",
    "MHATokenToKVPool": "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool",
    "MergedColumnParallelLinear": "sglang.srt.layers.linear:MergedColumnParallelLinear",
    "PPMissingLayer": "sglang.srt.layers.utils:PPMissingLayer",
    "PPProxyTensors": "sglang.srt.model_executor.forward_batch_info:PPProxyTensors",
    "ParallelLMHead": "sglang.srt.layers.vocab_parallel_embedding:ParallelLMHead",
    "PlatformEnum": "sglang.srt.platforms.device_mixin:PlatformEnum",
    "QKVParallelLinear": "sglang.srt.layers.linear:QKVParallelLinear",
    "QuantizationConfig": "sglang.srt.layers.quantization.base_config:QuantizationConfig",
    "RMSNorm": "sglang.srt.layers.layernorm:RMSNorm",
    "RadixAttention": "sglang.srt.layers.radix_attention:RadixAttention",
    "ReplicatedLinear": "sglang.srt.layers.linear:ReplicatedLinear",
    "RowParallelLinear": "sglang.srt.layers.linear:RowParallelLinear",
    "SRTPlatform": "sglang.srt.platforms.interface:SRTPlatform",
    "ShortConvAttnBackend": (
        "sglang.srt.layers.attention.linear.short_conv_backend:ShortConvAttnBackend"
    ),
    "ShortConvHybridAttnBackend": (
        "sglang.srt.layers.attention.hybrid_linear_attn_backend:ShortConvHybridAttnBackend"
    ),
    "SiluAndMul": "sglang.srt.layers.activation:SiluAndMul",
    "SpecInput": "sglang.srt.speculative.spec_info:SpecInput",
    "SpecInputType": "sglang.srt.speculative.spec_info:SpecInputType",
    "StandardCombineInput": "sglang.srt.layers.moe.token_dispatcher:StandardCombineInput",
    "StandardDispatchOutput": "sglang.srt.layers.moe.token_dispatcher:StandardDispatchOutput",
    "TopK": "sglang.srt.layers.moe.topk:TopK",
    "TopKOutputFormat": "sglang.srt.layers.moe.topk:TopKOutputFormat",
    "TorchNativeAttnBackend": (
        "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend"
    ),
    "UnquantizedEmbeddingMethod": (
        "sglang.srt.layers.quantization.unquant:UnquantizedEmbeddingMethod"
    ),
    "UnquantizedFusedMoEMethod": "sglang.srt.layers.quantization.unquant:UnquantizedFusedMoEMethod",
    "UnquantizedLinearMethod": "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod",
    "VocabParallelEmbedding": ("sglang.srt.layers.vocab_parallel_embedding:VocabParallelEmbedding"),
    "add_prefix": "sglang.srt.utils:add_prefix",
    "can_dispatch_fused_lfm_short_conv": (
        "sglang.kernels.ops.mamba.lfm_short_conv:can_dispatch_fused_lfm_short_conv"
    ),
    "causal_conv1d_fn": "sglang.srt.layers.attention.mamba.causal_conv1d:causal_conv1d_fn",
    "causal_conv1d_update": "sglang.srt.layers.attention.mamba.causal_conv1d:causal_conv1d_update",
    "commit_mamba_states_after_verify": (
        "sglang.srt.speculative.spec_utils:commit_mamba_states_after_verify"
    ),
    "compute_spec_logprobs": "sglang.srt.layers.logprob_processor:compute_spec_logprobs",
    "declare_resolution": "sglang.srt.arg_groups.overrides:declare_resolution",
    "current_platform": "sglang.srt.platforms:current_platform",
    "default_weight_loader": "sglang.srt.model_loader.weight_utils:default_weight_loader",
    "eager_on_graph": (
        "sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph:eager_on_graph"
    ),
    "generate_sequence_lengths": "sglang.srt.lora.utils:generate_sequence_lengths",
    "fused_lfm_short_conv_decode": (
        "sglang.kernels.ops.mamba.lfm_short_conv:fused_lfm_short_conv_decode"
    ),
    "get_attn_backend": "sglang.srt.model_executor.forward_context:get_attn_backend",
    "get_device_memory_capacity": "sglang.srt.utils.common:get_device_memory_capacity",
    "get_forward_batch": "sglang.srt.model_executor.runner_utils.forward_batch:get_forward_batch",
    "get_linear_attn_spec": "sglang.srt.configs.linear_attn_model_registry:get_linear_attn_spec",
    "get_lora": "sglang.srt.runtime_context:get_lora",
    "get_parallel": "sglang.srt.runtime_context:get_parallel",
    "get_server_args": "sglang.srt.runtime_context:get_server_args",
    "get_pp_indices": "sglang.srt.distributed.utils:get_pp_indices",
    "get_spec": "sglang.srt.runtime_context:get_spec",
    "make_layers": "sglang.srt.utils:make_layers",
    "mamba_track_grid": "sglang.srt.runtime_context:mamba_track_grid",
    "model_config_of": "sglang.srt.arg_groups.overrides:model_config_of",
    "prepare_mamba_track_for_verify": (
        "sglang.srt.speculative.spec_utils:prepare_mamba_track_for_verify"
    ),
    "register_resolution_hook": "sglang.srt.arg_groups.resolution_hooks:register_resolution_hook",
    "replace_submodule": "sglang.srt.utils:replace_submodule",
    "resolving_view": "sglang.srt.arg_groups.overrides:resolving_view",
    "sglang_version": "sglang.version:__version__",
    "tensor_model_parallel_all_reduce": "sglang.srt.distributed:tensor_model_parallel_all_reduce",
}
"""Our name for it -> ``module:name``."""

REPLACED = {
    "LoRAAdapter": "sglang.srt.lora.lora.LoRAAdapter",
    "LoRAManager": "sglang.srt.lora.lora_manager.LoRAManager",
    "assign_req_to_token_pool_func": (
        "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func"
    ),
}
"""All that ``replacements.py`` may put something of ours in the place of: our name for it -> its full name.

``LoRAAdapter``, ``LoRAManager``: by ``lora.py``, when the model is built with LoRA on. SGLang makes both by name.
``assign_req_to_token_pool_func``: by ``cpu_speculation.py``, with drafts on a CPU. A Triton kernel.
"""
