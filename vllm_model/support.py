"""Which combinations of options can't be served right, found out before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import QuantisationPlan
from lfm2_plugin.dispatch import check_choice

from .engine_api import (
    SUPPORTED,
    ModelConfig,
    QuantizationConfig,
    VllmConfig,
    captures_whole_steps,
    device_type,
    expert_ranks,
    kv_connectors,
    missing_capabilities,
    on_cpu,
    pipeline_needs_compilation,
    pipeline_stages,
    speculation_needs_triton,
    vllm_version,
)

ARCHITECTURE = "Lfm2MoeForCausalLM"
_OFFLOAD = ("OffloadingConnector", "SimpleCPUOffloadConnector")
"""Connectors of vLLM that move cache blocks between the memory of an accelerator and the machine's."""
_KNOW_OTHER_STATES = ("MoRIIOConnector", "NixlConnector", "NixlPullConnector", "NixlPushConnector")
"""Connectors of vLLM that take a conv state apart by the layouts of Mamba and GDN, and raise for any other."""


def check_role(model_config: ModelConfig) -> None:
    """Refuse to draft for another model.

    Raises:
        ValueError: what is wrong and what to do.
    """
    if model_config.runner_type == "draft":
        raise ValueError(
            f"{model_config.model} has conv states, and vLLM can't draft with such a model: its runner gives drafters "
            'one cache of keys and values. Use {"method": "ngram"} in --speculative-config, or a drafter made of '
            "attention only that shares the tokenizer."
        )


def check_runner(model_config: ModelConfig) -> None:
    """Refuse to make vectors of text where nobody asked for that.

    Raises:
        ValueError: what is wrong and what to do.
    """
    if model_config.runner == "auto" and model_config.runner_type == "pooling":
        named = ", ".join(model_config.hf_config.architectures or ()) or "nothing"
        raise ValueError(
            f"vLLM would serve this model for embeddings instead of text: its config.json has no architectures, or "
            f'some that mean that ({named}). For text add "architectures": ["{ARCHITECTURE}"] to config.json, or '
            f'--hf-overrides \'{{"architectures": ["{ARCHITECTURE}"]}}\'; for embeddings say --runner pooling.'
        )


def check_support(arch: Lfm2MoeArch, vllm_config: VllmConfig) -> None:
    """Refuse what would fail later or give other tokens.

    Raises:
        ValueError: what is wrong and what to do.
        ImpossibleChoice: ``LFM2_PLUGIN_OPS`` asks for what can't run here.
    """
    if missing := missing_capabilities():
        raise ValueError(
            f"vLLM {vllm_version} lacks {', '.join(missing)}, which lfm2-plugin builds on. Install a release from "
            f"{SUPPORTED[0]} to {SUPPORTED[1]} or a newer lfm2-plugin, or set LFM2_PLUGIN=off for vLLM's own model."
        )
    check_choice(device_type(), captures_graphs=captures_whole_steps(vllm_config))
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size
    if arch.num_heads % ranks or arch.hidden_size % ranks:
        raise ValueError(
            f"{arch.num_heads} heads and {arch.hidden_size} channels can't be divided over "
            f"--tensor-parallel-size {ranks}; choose a divisor of both."
        )
    if arch.num_kv_heads % ranks and ranks % arch.num_kv_heads:
        raise ValueError(
            f"{arch.num_kv_heads} kv heads fit no --tensor-parallel-size {ranks}; choose a divisor or a multiple."
        )
    experts = arch.num_experts + parallel.eplb_config.num_redundant_experts
    if experts % expert_ranks(vllm_config):
        raise ValueError(
            f"{experts} experts can't be divided evenly over {expert_ranks(vllm_config)} expert-parallel ranks; choose "
            f"tensor and data parallel sizes whose product divides {experts}, or leave out --enable-expert-parallel."
        )
    _check_stages(arch, vllm_config)
    _check_connectors(vllm_config)
    if on_cpu() and parallel.data_parallel_size > 1:
        raise ValueError(
            "On a CPU vLLM can't run a model with experts under --data-parallel-size: its communicator lacks "
            "all_gatherv, and the first request fails. Start one server for each replica."
        )
    if pipeline_needs_compilation(vllm_config):
        raise ValueError(
            "On a CPU vLLM can't run pipeline stages without compilation: its runner then has no buffer for what "
            "a stage receives. Leave out --enforce-eager (and LoRA, which switches compilation off on a CPU), or use "
            "--tensor-parallel-size."
        )
    if speculation_needs_triton(vllm_config):
        raise ValueError(
            "Without Triton vLLM can't combine speculative decoding with prefix caching for a model with conv states: "
            "its runner copies the states with Triton kernels. Add --no-enable-prefix-caching "
            "(enable_prefix_caching=False), or leave out --speculative-config."
        )


@contextmanager
def named_without_kernel(
    quant_config: QuantizationConfig | None, plan: QuantisationPlan
) -> Iterator[None]:
    """Say of which format there is no kernel on this machine, where vLLM says it of a layer only.

    Raises:
        ValueError: in place of vLLM's, with what to do.
    """
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        ours = "vLLM has no kernel" in str(error)
        if quant_config is None or not (ours or "find a kernel" in str(error)):
            raise
        formats = ", ".join(sorted({plan.of(name).name for name in plan.quantised_modules}))
        reason = " ".join(str(error).split()).rstrip(". ")
        if not ours:
            reason = (
                f"vLLM has no kernel on this machine for weights quantised by {quant_config.get_name()!r} ({reason}). "
                "Serve the unquantised checkpoint, or use a GPU"
            )
        raise ValueError(
            f"{reason}. The checkpoint's weights are {formats or 'unquantised'}."
        ) from error


def _check_stages(arch: Lfm2MoeArch, vllm_config: VllmConfig) -> None:
    """Every pipeline stage needs layers of both kinds.

    Without attention, vLLM's workers disagree on the layout of their caches and stop; without a short convolution the
    tokens come out wrong, and nothing says so (seen on a CPU).
    """
    stages = pipeline_stages(vllm_config, arch.num_layers)
    kinds = {"attention": arch.attention_layers, "short convolution": arch.conv_layers}
    for number, (first, last) in enumerate(stages):
        for kind, layers in kinds.items():
            if len(stages) > 1 and not any(first <= i < last for i in layers):
                raise ValueError(
                    f"Pipeline stage {number} would hold layers {first} to {last - 1} and no {kind} layer (those are "
                    f"{', '.join(map(str, layers))}), which vLLM can't serve right. Choose a smaller "
                    f"--pipeline-parallel-size, or cut otherwise with VLLM_PP_LAYER_PARTITION."
                )


def _check_connectors(vllm_config: VllmConfig) -> None:
    """What takes cache blocks out of the engine has to take the conv states along."""
    connectors = kv_connectors(vllm_config)
    blind = [name for name, knows_several_caches in connectors.items() if not knows_several_caches]
    if blind:
        raise ValueError(
            f"{', '.join(blind)} can't move what LFM2-MoE keeps: vLLM switches its manager of several kinds of cache "
            "off for such a connector, and conv states can't be kept without it. Choose a connector that supports it "
            "(SupportsHMA), such as OffloadingConnector, or leave out --kv-transfer-config."
        )
    foreign = [name for name in connectors if name in _KNOW_OTHER_STATES]
    if foreign:
        raise ValueError(
            f"{', '.join(foreign)} can't move the state of a short convolution: vLLM has it take states apart by the "
            "layouts of Mamba and GDN only. Leave out --kv-transfer-config."
        )
    offloading = [name for name in connectors if name in _OFFLOAD]
    if on_cpu() and offloading:
        raise ValueError(
            f"{', '.join(offloading)} moves cache blocks from an accelerator's memory to the machine's, and vLLM runs "
            "on a CPU here. Leave out --kv-offloading-size and --kv-transfer-config."
        )
