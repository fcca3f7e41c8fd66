"""What vLLM has been told about a checkpoint's quantisation, and what it does with weights in an update."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from .engine_api import (
    QuantizationConfig,
    RoutedExperts,
    VllmConfig,
    get_layerwise_info,
    place_kernel_tensors,
)


def is_reloading(module: nn.Module) -> bool:
    """Whether vLLM holds back what is loaded into a module until all of it has come, in a weight update."""
    return get_layerwise_info(module).kernel_tensors is not None


def is_half_reloaded(module: nn.Module) -> bool:
    """Whether in such an update a part of a module's weights has come and a part hasn't."""
    info = get_layerwise_info(module)
    return is_reloading(module) and 0 < info.load_numel < (info.load_numel_total or 0)


def end_reload(module: nn.Module) -> None:
    """Let what is loaded into a module be written at once: the parameters in use are its parameters again.

    For the length of an update vLLM has put others in their place, without memory, whose loaders collect.
    """
    info = get_layerwise_info(module)
    if info.kernel_tensors is None:
        return
    place_kernel_tensors(module, info)
    for parameter in module.parameters(recurse=False):  # those that vLLM doesn't replace, biases
        loader = getattr(parameter, "weight_loader", None)
        if loader is not None:
            parameter.weight_loader = inspect.unwrap(
                loader, stop=lambda f: getattr(f, "__name__", "") != "online_process_loader"
            )
    info.reset()


def quantisation_settings(vllm_config: VllmConfig) -> Mapping[str, Any] | None:
    """The quantization_config that came with the checkpoint; None for an unquantised one."""
    config = vllm_config.model_config.hf_config
    for name in ("quantization_config", "compression_config"):
        settings = getattr(config, name, None)
        if settings is not None:
            return settings.to_dict() if hasattr(settings, "to_dict") else settings
    return None


def set_quantisation_settings(vllm_config: VllmConfig, settings: Mapping[str, Any]) -> None:
    """Have vLLM make its quantisation config, which it does after the options are settled, of ``settings``."""
    vllm_config.model_config.hf_config.quantization_config = settings


def is_unused(quant_config: QuantizationConfig | None, parameter: str) -> bool:
    """Whether vLLM leaves out the parameter of a quantised checkpoint because none of its kernels reads it."""
    if quant_config is None:
        return False
    return quant_config.get_checkpoint_weight_mapper().map_name(parameter) is None


def physical_experts(experts: RoutedExperts) -> dict[int, list[int]]:
    """Each expert of a checkpoint -> the experts of the engine that it is loaded into, which may be several (EPLB)."""
    found: dict[int, list[int]] = {}
    for _, name, physical, shard in experts.get_expert_mapping():
        if shard == "w2":
            found.setdefault(int(name.split(".")[1]), []).append(physical)
    return found
