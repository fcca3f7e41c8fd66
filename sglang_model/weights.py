"""Loading a checkpoint: the names of ``lfm2_plugin.checkpoint`` into SGLang's parameters, every tensor accounted for.

A checkpoint on local disk is checked by its headers before anything is allocated (:func:`check_files`). Whatever the
engine streams is checked again as it comes (:func:`load_weights`), which may be called any number of times, with all or
a part of the tensors, as weight updates of reinforcement learning do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import StreamCheck, Target, check_checkpoint, translate

from .config import Lfm2MoeConfig
from .engine_api import QuantizationConfig, checkpoint_folder, default_weight_loader

if TYPE_CHECKING:
    from .model import Lfm2MoeForCausalLM

# Modules that are named otherwise than in the table.
_RENAMED = {"self_attn.scales": "self_attn.attn"}
_EXPERTS = "feed_forward.experts"
_ADAPTED = ".base_layer."  # a module within SGLang's LoRA layer
_OUTSIDE_LAYERS = {"embed_tokens": "model.embed_tokens", "embedding_norm": "model.embedding_norm"}


def check_files(
    arch: Lfm2MoeArch, config: Lfm2MoeConfig, quant_config: QuantizationConfig | None
) -> None:
    """Check a local safetensors checkpoint by its headers, in milliseconds, before any memory is taken.

    Raises:
        CheckpointError: names every missing, unexpected, misshapen tensor and every unreadable file.
    """
    folder = checkpoint_folder(config)
    if folder is not None:
        check_checkpoint(arch, folder, quantised=quant_config is not None)


def load_weights(
    model: Lfm2MoeForCausalLM,
    arch: Lfm2MoeArch,
    weights: Iterable[tuple[str, torch.Tensor]],
) -> set[str]:
    """Load ``weights`` into the layers that ``model`` has on this rank.

    Returns:
        The names of the parameters that were filled.

    Raises:
        CheckpointError: a tensor that the model doesn't have or of another shape; or, in the first load of a model
            whose parameters hold nothing yet, a tensor that never came.
    """
    check = StreamCheck(arch, quantised=model.quant_config is not None)
    parameters = {
        name.replace(_ADAPTED, "."): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    loaded = set()
    for name, tensor in weights:
        check.see(name, tuple(tensor.shape))
        target = translate(name)
        if target is None or not _is_here(model, target):
            continue
        for parameter, piece, place in _pieces(arch, target, tensor):
            if parameter in parameters:
                if model.packed is not None:
                    model.packed.open(parameter)
                _fill(parameters[parameter], piece, parameter, place)
                loaded.add(parameter)
    if model.packed is not None:
        model.packed.close()
    if not model.weights_loaded:
        check.finish()
        model.weights_loaded = True
    return loaded


def _is_here(model: Lfm2MoeForCausalLM, target: Target) -> bool:
    """Whether the tensor belongs to this pipeline stage."""
    if target.layer is None:
        return True  # a stage without the parameter has no place for it
    return model.start_layer <= target.layer < model.end_layer


Place = dict[str, object]


def _pieces(
    arch: Lfm2MoeArch, target: Target, tensor: torch.Tensor
) -> Iterable[tuple[str, torch.Tensor, Place]]:
    """Where a tensor goes: (parameter, the piece for it, arguments of the parameter's own loader)."""
    if target.layer is None:
        yield f"{_OUTSIDE_LAYERS.get(target.module, target.module)}.{target.parameter}", tensor, {}
        return
    layer = f"model.layers.{target.layer}"
    if target.module != _EXPERTS:
        module = _RENAMED.get(target.module, target.module)
        bare = module == "feed_forward.expert_bias"
        parameter = f"{layer}.{module}" if bare else f"{layer}.{module}.{target.parameter}"
        fused = module.endswith(("qkv_proj", "w13"))
        yield parameter, tensor, {"loaded_shard_id": target.shard} if fused else {}
        return
    if target.expert is not None:
        yield _expert_piece(layer, str(target.shard), target.expert, target.parameter, tensor)
        return
    for expert in range(arch.num_experts):
        if target.shard == "w2":
            yield _expert_piece(layer, "w2", expert, target.parameter, tensor[expert])
            continue
        for shard, half in zip(("w1", "w3"), tensor[expert].chunk(2), strict=True):
            yield _expert_piece(layer, shard, expert, target.parameter, half)


def _expert_piece(
    layer: str, shard: str, expert: int, parameter: str, tensor: torch.Tensor
) -> tuple[str, torch.Tensor, Place]:
    stack = "w2" if shard == "w2" else "w13"
    name = f"{layer}.{_EXPERTS}.{stack}_{parameter}"
    return name, tensor, {"weight_name": name, "shard_id": shard, "expert_id": expert}


def _fill(parameter: torch.nn.Parameter, tensor: torch.Tensor, name: str, place: Place) -> None:
    loader = getattr(parameter, "weight_loader", default_weight_loader)
    loader(parameter, tensor, **place)
