"""The weights of a model on a CPU: packed for the product while serving, plain while they are loaded, updated or saved.

A packed weight replaces the plain one, whose memory is given back, except in a tied embedding, which is also read by
row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lfm2_plugin.ops.linear import PackedWeight, Weight, can_pack, linear

from .engine_api import (
    FusedMoE,
    UnquantizedEmbeddingMethod,
    UnquantizedFusedMoEMethod,
    UnquantizedLinearMethod,
)


class PackedLinearMethod(UnquantizedLinearMethod):
    """SGLang's method object of a linear layer whose weight is packed."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.packed = weight

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        """(..., K) -> (..., N)."""
        rows = linear(x.reshape(-1, x.shape[-1]), self.packed, bias)
        return rows.view(*x.shape[:-1], rows.shape[-1])


class PackedHeadMethod(UnquantizedEmbeddingMethod):
    """The method object of a head; where it is tied, embeddings are looked up in the plain weight as before."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.packed = weight

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        """(T, D) -> (T, V)."""
        return linear(x.to(self.packed.dtype), self.packed, bias)


class PackedWeights:
    """Packs what can be packed of a model, and unpacks what is about to be written.

    Args:
        model: with ``lm_head``; only unquantised weights of SGLang's own layers are touched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._open: set[nn.Module] = set()

    def pack(self) -> None:
        """Pack all that is plain."""
        for module in self._model.modules():
            self._pack(module)
        self._open.clear()

    def open(self, parameter: str) -> None:
        """Make the parameter of that name plain, so that it can be written; :meth:`close` packs it again."""
        module = self._model.get_submodule(parameter.rpartition(".")[0])
        self._open_module(getattr(module, "base_layer", module))  # within SGLang's LoRA layer

    def close(self) -> None:
        """Pack again what was opened."""
        for module in self._open:
            self._pack(module)
        self._open.clear()

    @contextmanager
    def all_plain(self) -> Iterator[None]:
        """For the time of a save, all parameters plain."""
        try:
            for module in self._model.modules():
                self._open_module(module)
            yield
        finally:
            self.close()

    def _open_module(self, module: nn.Module) -> None:
        if module not in self._open:
            self._unpack(module)
            self._open.add(module)

    def _pack(self, module: nn.Module) -> None:
        method = getattr(module, "quant_method", None)
        if isinstance(module, FusedMoE):
            if type(method) is UnquantizedFusedMoEMethod and can_pack(module.w13_weight):
                module.packed_experts = tuple(
                    [PackedWeight.of(expert) for expert in stack.data]
                    for stack in (module.w13_weight, module.w2_weight)
                )
                _drop(module.w13_weight, module.w2_weight)
        elif type(method) is UnquantizedLinearMethod and can_pack(module.weight):
            module.quant_method = PackedLinearMethod(PackedWeight.of(module.weight))
            _drop(module.weight)
        elif (
            module is self._model.lm_head
            and type(method) is UnquantizedEmbeddingMethod
            and can_pack(module.weight)
        ):
            module.quant_method = PackedHeadMethod(PackedWeight.of(module.weight))

    def _unpack(self, module: nn.Module) -> None:
        method = getattr(module, "quant_method", None)
        if getattr(module, "packed_experts", None) is not None:
            for parameter, experts in zip(
                (module.w13_weight, module.w2_weight), module.packed_experts, strict=True
            ):
                parameter.data = torch.stack([expert.unpack() for expert in experts])
            module.packed_experts = None
        elif type(method) is PackedLinearMethod:
            module.weight.data = method.packed.unpack()
            module.quant_method = UnquantizedLinearMethod()
        elif type(method) is PackedHeadMethod:
            module.quant_method = UnquantizedEmbeddingMethod()


def _drop(*parameters: nn.Parameter) -> None:
    """Give the memory back; dtype and device stay."""
    for parameter in parameters:
        parameter.data = parameter.data.new_empty(0)
