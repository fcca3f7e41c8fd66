"""What happens while vLLM settles its options, in the process that the user started: refusals, and our defaults.

vLLM asks a table of such classes, by architecture, before it starts any process of the engine
(:mod:`lfm2_plugin.register` puts ours in). Every process imports this file for every model, so it imports nothing of
weight before it is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine_api import ModelConfig, VllmConfig

LARGEST_CAPTURE = 1024
"""Decode batches of up to so many sequences run as CUDA graphs by default; vLLM stops at 512 on most GPUs."""


class Lfm2MoeOptions:
    """LFM2-MoE in vLLM's table."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Refuse what shows as soon as the model is known; vLLM asks a second time, with all options.

        Raises:
            ValueError: the model is a drafter, of whatever target.
        """
        from .support import check_role

        check_role(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what can be seen now, and set what the user left open.

        What depends on options that vLLM settles later is refused when the model is built.

        Raises:
            ValueError: what is wrong and what to do.
        """
        from lfm2_plugin.arch import Lfm2MoeArch

        from .support import check_runner, check_support
        from .weights import check_files, ignore_mistral_files, name_modules_explicitly

        arch = Lfm2MoeArch.from_config(vllm_config.model_config.hf_config)
        check_runner(vllm_config.model_config)
        check_support(arch, vllm_config)
        name_modules_explicitly(vllm_config, check_files(arch, vllm_config))
        ignore_mistral_files(vllm_config)
        capture_wide_decodes(vllm_config)
        if vllm_config.lora_config is not None:
            from .lora import check_adapters_of_requests

            check_adapters_of_requests()


def capture_wide_decodes(vllm_config: VllmConfig) -> None:
    """Have decodes of as many sequences as may run at once captured, up to ``LARGEST_CAPTURE``, where vLLM stops below.

    The number itself has to be among the sizes, since a captured decode holds no more sequences than may run: of sizes
    on a grid that lies beside it, the last would be the one before. vLLM takes that number in by itself up to where its
    own captures end.

    What the user says stays. With drafts vLLM has a grid of its own, by tokens, which stays too.
    """
    from .engine_api import captures_graphs, largest_capture

    compilation = vllm_config.compilation_config
    said = compilation.max_cudagraph_capture_size, compilation.cudagraph_capture_sizes
    if not captures_graphs() or said != (None, None) or vllm_config.num_speculative_tokens:
        return
    scheduler = vllm_config.scheduler_config
    sequences = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens, LARGEST_CAPTURE)
    if sequences > largest_capture():
        every = vllm_config.performance_mode == "interactivity"
        compilation.cudagraph_capture_sizes = capture_sizes(sequences, every)


def capture_sizes(largest: int, every_small_one: bool = False) -> list[int]:
    """Sizes to capture, in steps as wide as vLLM's: 8 tokens, and 16 from 256 on.

    Args:
        largest: the last of them, on the steps or off; above 256.
        every_small_one: each size up to 32, as vLLM has it under ``--performance-mode interactivity``.
    """
    small = range(1, 33) if every_small_one else (1, 2, 4)
    return sorted({*small, *range(8, 256, 8), *range(256, largest, 16), largest})
