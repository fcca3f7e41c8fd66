"""What happens while vLLM settles its options, in the process that the user started: refusals, and our defaults.

vLLM asks a table of such classes, by architecture, before it starts any process of the engine
(:mod:`lfm2_plugin.register` puts ours in). Every process imports this file for every model, so it imports nothing of
weight before it is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine_api import VllmConfig

LARGEST_CAPTURE = 1024
"""Decode batches of up to so many sequences run as CUDA graphs by default; vLLM stops at 512 on most GPUs."""


class Lfm2MoeOptions:
    """LFM2-MoE in vLLM's table."""

    @staticmethod
    def verify_and_update_model_config(model_config: object) -> None:
        """Nothing: vLLM asks a second time, with all options."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what can be seen now, and set what the user left open.

        What depends on options that vLLM settles later is refused when the model is built.

        Raises:
            ValueError: what is wrong and what to do.
        """
        from lfm2_plugin.arch import Lfm2MoeArch

        from .support import check_support
        from .weights import check_files, ignore_mistral_files, name_modules_explicitly

        arch = Lfm2MoeArch.from_config(vllm_config.model_config.hf_config)
        check_support(arch, vllm_config)
        check_files(arch, vllm_config)
        name_modules_explicitly(arch, vllm_config)
        ignore_mistral_files(vllm_config)
        capture_wide_decodes(vllm_config)
        if vllm_config.lora_config is not None:
            from .lora import check_adapters_of_requests

            check_adapters_of_requests()


def capture_wide_decodes(vllm_config: VllmConfig) -> None:
    """Raise vLLM's default for the largest CUDA graph to the number of requests at once, up to ``LARGEST_CAPTURE``.

    With drafts vLLM captures a graph for every number of sequences by itself.
    """
    from .engine_api import captures_graphs

    compilation = vllm_config.compilation_config
    said = compilation.max_cudagraph_capture_size, compilation.cudagraph_capture_sizes
    if not captures_graphs() or said != (None, None) or vllm_config.num_speculative_tokens:
        return
    sequences = min(vllm_config.scheduler_config.max_num_seqs, LARGEST_CAPTURE)
    if sequences > 512:
        compilation.max_cudagraph_capture_size = -(-sequences // 16) * 16  # vLLM's steps above 256
