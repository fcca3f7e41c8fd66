"""What vLLM's quantisation configs say of each layer of our model, inside the child."""

import re
from functools import partial
from typing import Any

from torch import nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from tests.engine_vllm import engine_jobs
from vllm_model.engine_api import RoutedExperts

PLAIN = (UnquantizedLinearMethod, UnquantizedFusedMoEMethod, UnquantizedEmbeddingMethod)
NO_KERNEL = re.compile("No [A-Za-z0-9]+ MoE backend supports the deployment configuration")


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that may be quantised, by the names under which they ask."""
    names = {}
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            names[name.removesuffix(".routed_experts")] = module
        elif hasattr(module, "quant_method") and isinstance(module.quant_method, PLAIN):
            names[name] = module
    return names


def is_quantised(config: Any, layer: nn.Module, name: str) -> bool | str:
    """What vLLM decides; that it has no kernel for it here is a decision too, any other error is told."""
    try:
        method = config.get_quant_method(layer, name)
    except Exception as error:
        return NO_KERNEL.search(str(error)) is not None or str(error)
    return method is not None and not isinstance(method, PLAIN)


def decide(model: nn.Module, method: str, settings: dict[str, Any]) -> dict[str, bool | str]:
    config = get_quantization_config(method).from_config(settings)
    ours = type(model)
    ours.__new__(ours, config)  # as in an engine, this tells the config how our modules are called
    with set_current_vllm_config(model.vllm_config):
        return {name: is_quantised(config, layer, name) for name, layer in layers(model).items()}


def decisions(llm, configs: list[tuple[str, dict[str, Any]]]) -> list[dict[str, bool | str]]:
    """For each (vLLM's name of a method, quantization_config): layer -> whether it is quantised."""
    return [llm.apply_model(partial(decide, method=m, settings=s))[0] for m, s in configs]


def run_engine(model: str, engine: dict, steps: list[dict]) -> dict:
    """As in ``engine_jobs``, with the step above."""
    engine_jobs.STEPS |= {"decisions": decisions}
    return engine_jobs.run_engine(model, engine, steps)
