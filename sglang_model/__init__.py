"""LFM2-MoE for SGLang: not written yet.

This package holds the place of the SGLang front of ``lfm2-plugin``; it has no model class, and the
distribution declares no SGLang entry point, so installing it changes nothing in SGLang: the engine's
own ``Lfm2MoeForCausalLM`` serves. The vLLM front is ``vllm_model``.
"""
