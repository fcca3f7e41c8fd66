"""Loading a checkpoint: the names of ``lfm2_plugin.checkpoint`` into vLLM's parameters, every tensor accounted for.

A checkpoint on local disk is checked by its headers before anything is allocated (:func:`check_files`). Whatever the
engine streams is checked again as it comes (:func:`load_weights`), which may be called any number of times, with all or
a part of the tensors, as weight updates of reinforcement learning do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import StreamCheck, check_checkpoint
from lfm2_plugin.checkpoint.names import LAYER

from .engine_api import AutoWeightsLoader, VllmConfig, WeightsMapper

if TYPE_CHECKING:
    from .model import Lfm2MoeForCausalLM

LORA_NAMES = {".conv.": ".short_conv."}
"""The one module that is named otherwise than in a checkpoint: ``conv.conv`` would match LoRA targets twice."""

NAMES = WeightsMapper(
    orig_to_new_substr=LORA_NAMES,
    orig_to_new_stacked={
        f".{row.source}.": (f".{row.module}.", row.shard) for row in LAYER if row.shard is not None
    },
)
"""Checkpoint names to parameters of this package, by the one table. The w1, w2, w3 of experts are left to vLLM's expert
layer, which knows which of them a rank holds."""

LOCAL_FORMATS = ("auto", "hf", "safetensors")


def check_files(arch: Lfm2MoeArch, vllm_config: VllmConfig) -> None:
    """Check a local safetensors checkpoint by its headers, in milliseconds, before any memory is taken.

    Raises:
        CheckpointError: names every missing, unexpected, misshapen tensor and every unreadable file.
    """
    folder = Path(vllm_config.model_config.model)
    if vllm_config.load_config.load_format not in LOCAL_FORMATS or not folder.is_dir():
        return
    if any(folder.glob("*.safetensors")):
        # vLLM makes the second out of the first, after it has settled its options.
        quantised = vllm_config.model_config.quantization or vllm_config.quant_config
        check_checkpoint(arch, folder, quantised=quantised is not None)


def load_weights(
    model: Lfm2MoeForCausalLM,
    arch: Lfm2MoeArch,
    vllm_config: VllmConfig,
    weights: Iterable[tuple[str, torch.Tensor]],
) -> set[str]:
    """Load ``weights`` into ``model``.

    Returns:
        The names of the parameters that were filled, as vLLM wants to know.

    Raises:
        CheckpointError: a tensor that the model doesn't have or of another shape; or, in the first load of a model
            whose parameters hold nothing yet, a tensor that never came.
    """
    check = StreamCheck(arch, quantised=vllm_config.quant_config is not None)

    def checked() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            check.see(name, tuple(tensor.shape))
            yield name, tensor

    loaded = AutoWeightsLoader(model).load_weights(checked(), mapper=NAMES)
    if not model.weights_loaded:
        # With expert parallelism the engine may leave out what belongs to other ranks.
        check.finish(all_experts=not vllm_config.parallel_config.enable_expert_parallel)
        model.weights_loaded = True
    return loaded
