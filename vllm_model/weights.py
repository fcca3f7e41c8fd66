"""Loading a checkpoint: the names of ``lfm2_plugin.checkpoint`` into vLLM's parameters, every tensor accounted for.

A checkpoint on local disk is checked by its headers before anything is allocated (:func:`check_files`). Whatever the
engine streams is checked again as it comes (:func:`load_weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import Ledger, QuantisationPlan, check_checkpoint, plan_of
from lfm2_plugin.checkpoint.loader import Loader
from lfm2_plugin.checkpoint.placement import Place
from lfm2_plugin.checkpoint.quantisation import explicit
from lfm2_plugin.checkpoint.readers import holds_weights
from lfm2_plugin.checkpoint.spellings import hub_name

from .cpu_weights import writable
from .engine_api import (
    RoutedExperts,
    VllmConfig,
    default_weight_loader,
)
from .engine_weights import (
    is_unused,
    physical_experts,
    quantisation_settings,
    set_quantisation_settings,
)

if TYPE_CHECKING:
    from .model import Lfm2MoeForCausalLM

LORA_NAMES = {".conv.": ".short_conv."}
"""The one module that is named otherwise than in a checkpoint: ``conv.conv`` would match LoRA targets twice."""
LOCAL_FORMATS = ("auto", "hf", "safetensors", "pt")


def check_files(arch: Lfm2MoeArch, vllm_config: VllmConfig) -> QuantisationPlan:
    """Check a local checkpoint by its headers, in a tenth of a second, before any memory is taken.

    Returns:
        What each matmul of the checkpoint is.

    Raises:
        CheckpointError: names every missing, unexpected, misshapen, mistyped tensor and every unreadable file.
        UnsupportedQuantisation: the quantization_config is of an unknown method or format, or malformed.
    """
    quantisation = quantisation_settings(vllm_config)
    folder = local_folder(vllm_config)
    if folder is None:
        return plan_of(arch, quantisation)
    return check_checkpoint(arch, folder, quantisation)


def name_modules_explicitly(vllm_config: VllmConfig, plan: QuantisationPlan) -> None:
    """Write out the lists of modules in the quantization_config, before vLLM matches them by rules of its own.

    Args:
        vllm_config: settled but for the quantisation config.
        plan: of :func:`check_files`; of a checkpoint whose files aren't known nothing is written.

    Raises:
        UnsupportedQuantisation: modules that vLLM serves as one layer are of different formats.
    """
    quantisation = quantisation_settings(vllm_config)
    if quantisation is not None and local_folder(vllm_config) is not None:
        set_quantisation_settings(vllm_config, explicit(quantisation, plan, hub_name))


def local_folder(vllm_config: VllmConfig) -> Path | None:
    """Where the checkpoint's files are, if they are ones that we read and not on the hub."""
    folder = Path(vllm_config.model_config.model)
    local = vllm_config.load_config.load_format in LOCAL_FORMATS
    return folder if local and holds_weights(folder) else None


def ignore_mistral_files(vllm_config: VllmConfig) -> None:
    """Have vLLM read the files that the index names, also where one beside them is called as Mistral's are."""
    load = vllm_config.load_config
    if load.load_format == "auto":
        load.load_format = "hf"


def load_weights(
    model: Lfm2MoeForCausalLM,
    vllm_config: VllmConfig,
    weights: Iterable[tuple[str, torch.Tensor]],
) -> set[str]:
    """Load ``weights`` into ``model``.

    Returns:
        The names of the parameters that were filled, as vLLM wants to know.

    Raises:
        CheckpointError: a tensor that the model doesn't have, or has in another shape or dtype; or, in the first load
            of a model whose parameters hold nothing yet or the half of an update, a tensor that never came or a
            parameter that stayed empty.
        ValueError: a part of a layer that vLLM can replace as a whole only.
    """
    all_must_come = model.half_written or not model.weights_loaded
    ledger = Ledger(model.arch, model.quantisation)
    with writable(model) as open_parameter:
        loader = VllmLoader(model, vllm_config, open_parameter)
        loader.load(ledger, weights)
        if all_must_come:
            # With expert parallelism the engine may leave out what belongs to other ranks.
            all_experts = not vllm_config.parallel_config.enable_expert_parallel
            ledger.finish(loader.unfilled(), all_experts=all_experts)
            model.weights_loaded = True
    model.half_written = False
    return loader.loaded


class VllmLoader(Loader):
    """Writes by the loaders that vLLM's layers give their parameters.

    Args:
        open_parameter: makes the parameter of a name writable.
    """

    modules = {  # noqa: RUF012
        "conv.in_proj": "short_conv.in_proj",
        "conv.conv": "short_conv.conv",
        "conv.out_proj": "short_conv.out_proj",
        "feed_forward.experts": "feed_forward.experts.routed_experts",
        "self_attn.scales": "self_attn.attn",
    }

    def __init__(
        self,
        model: Lfm2MoeForCausalLM,
        vllm_config: VllmConfig,
        open_parameter: Callable[[str], None],
    ) -> None:
        super().__init__(
            model,
            range(model.model.start_layer, model.model.end_layer),
            kv_is_quantised=vllm_config.cache_config.cache_dtype.startswith("fp8"),
        )
        self._open_parameter = open_parameter
        self._quant_config = vllm_config.quant_config
        self._experts = [m for m in model.modules() if isinstance(m, RoutedExperts)]
        self._physical = physical_experts(self._experts[0]) if self._experts else {}

    def write(self, where: Place, parameter: nn.Parameter, tensor: torch.Tensor) -> bool:
        self._open_parameter(where.parameter)
        self._model.half_written = True
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        if where.expert is None:
            loader(parameter, tensor, *(() if where.shard is None else (where.shard,)))
            return True
        is_here = [
            loader(
                parameter,
                tensor,
                weight_name=where.parameter,
                shard_id=where.shard,
                expert_id=physical,
                return_success=True,
            )
            for physical in self._physical[where.expert]
        ]
        # Of a layer that is being reloaded vLLM only takes note, and says nothing.
        return any(is_here) or self._experts[0].expert_map is None

    def is_unused(self, where: Place) -> bool:
        return super().is_unused(where) or is_unused(self._quant_config, where.parameter)
