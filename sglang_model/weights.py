"""Loading a checkpoint: the names of ``lfm2_plugin.checkpoint`` into SGLang's parameters, every tensor accounted for.

A checkpoint on local disk is checked by its headers before anything is allocated (:func:`check_files`). Whatever the
engine streams is checked again as it comes (:func:`load_weights`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import (
    CheckpointError,
    Ledger,
    QuantisationPlan,
    check_checkpoint,
    plan_of,
)
from lfm2_plugin.checkpoint.loader import Loader
from lfm2_plugin.checkpoint.placement import Place
from lfm2_plugin.checkpoint.quantisation import is_router, read_quantisation_config
from lfm2_plugin.checkpoint.readers import head_differs
from lfm2_plugin.checkpoint.report import summary

from .config import Lfm2MoeConfig
from .engine_api import checkpoint_folder, default_weight_loader, kv_cache_is_quantised

if TYPE_CHECKING:
    from .model import Lfm2MoeForCausalLM


def check_files(arch: Lfm2MoeArch, config: Lfm2MoeConfig) -> tuple[Lfm2MoeArch, QuantisationPlan]:
    """Check a local checkpoint by its headers, in a tenth of a second, before any memory is taken.

    Returns:
        The model, untied where the files have a head that isn't the embedding, as transformers unties it; and what
        each matmul of them is.

    Raises:
        CheckpointError: names every missing, unexpected, misshapen, mistyped tensor and every unreadable file.
            Or the router is quantised.
        UnsupportedQuantisation: the quantization_config is of an unknown method or format, or malformed.
    """
    quantisation = config.quantisation_settings
    folder = checkpoint_folder(config)
    if folder is None:
        return arch, plan_of(arch, quantisation)
    if quantisation is None:
        quantisation = read_quantisation_config(folder)  # ModelOpt's may lie beside config.json
    plan = check_checkpoint(arch, folder, quantisation)
    _refuse_quantised_routers(plan)
    if arch.tie_word_embeddings and head_differs(folder):
        arch = replace(arch, tie_word_embeddings=False)
    return arch, plan


def _refuse_quantised_routers(plan: QuantisationPlan) -> None:
    """Routers stay as they are here: four of many experts hang on small differences of their outputs."""
    routers = sorted(module for module in plan.quantised_modules if is_router(module))
    if routers:
        raise CheckpointError(
            f"The checkpoint's routers are quantised ({summary(routers)}), which is not supported in SGLang. Quantise "
            "it with 're:.*feed_forward.gate$' in the list of modules to ignore."
        )


def load_weights(
    model: Lfm2MoeForCausalLM, weights: Iterable[tuple[str, torch.Tensor]]
) -> set[str]:
    """Load ``weights`` into the layers that ``model`` has on this rank.

    Returns:
        The names of the parameters that were filled.

    Raises:
        CheckpointError: a tensor that the model doesn't have, or has in another shape or dtype; or, in the first load
            of a model whose parameters hold nothing yet, a tensor that never came or a parameter that stayed empty.
    """
    ledger = Ledger(model.arch, model.quantisation)
    loader = SglangLoader(model)
    loader.load(ledger, weights)
    if model.packed is not None:
        model.packed.close()
    if not model.weights_loaded:
        ledger.finish(loader.unfilled())
        model.weights_loaded = True
    return loader.loaded


class SglangLoader(Loader):
    """Writes by the loaders that SGLang's layers give their parameters."""

    modules = {"self_attn.scales": "self_attn.attn"}  # noqa: RUF012

    def __init__(self, model: Lfm2MoeForCausalLM) -> None:
        super().__init__(
            model,
            range(model.start_layer, model.end_layer),
            kv_is_quantised=kv_cache_is_quantised(),
        )
        self._packed = model.packed

    def write(self, where: Place, parameter: nn.Parameter, tensor: torch.Tensor) -> bool:
        if self._packed is not None:
            self._packed.open(where.parameter)
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        if where.expert is not None:
            loader(
                parameter,
                tensor,
                weight_name=where.parameter,
                shard_id=where.shard,
                expert_id=where.expert,
            )
        elif where.shard is not None:
            loader(parameter, tensor, loaded_shard_id=where.shard)
        else:
            loader(parameter, tensor)
        return True
