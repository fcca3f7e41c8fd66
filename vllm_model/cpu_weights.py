"""The weights of a model on a CPU: packed by vLLM for its kernels while serving, plain while they are loaded or saved.

vLLM lays out a CPU's weights once, after the first load, and keeps no plain copy; what is loaded later would be written
into the kernels' layout as if it were plain. Here a layer's weights become plain when the first tensor for it arrives,
and are laid out again, by vLLM itself, at the end of the load. So an update may consist of any tensors, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .engine_api import (
    Attention,
    CPUUnquantizedExperts,
    RoutedExperts,
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)
from .engine_weights import (
    end_reload,
    is_half_reloaded,
    is_reloading,
)

_BASE = (
    128  # the positions of weights are written as digits that every dtype of weights holds exactly
)


class PlainableLinearMethod(UnquantizedLinearMethod):
    """vLLM's method of a linear layer, except that its parameter stays and the packed weight can be made plain."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack the weight; vLLM puts an empty parameter in its place, which has nothing that a loader needs."""
        weight = layer.weight
        shape = weight.shape
        super().process_weights_after_loading(layer)
        if layer.weight is not weight:
            self.columns = shape[1]
            weight.data = layer.weight.data
            layer.weight = weight

    def plain(self, layer: nn.Module) -> torch.Tensor:
        """The weight (N, K) that was packed, bit for bit where it is finite: the product with the unit matrix."""
        unit = torch.eye(self.columns, dtype=layer.weight.dtype)
        return layer.cpu_linear(unit, layer.weight, None).t().contiguous()


class PackedWeights:
    """Makes plain what vLLM has packed of a model, where it is about to be written or saved.

    Args:
        model: freshly built, its weights not loaded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._packed = False
        self._open: set[nn.Module] = set()
        self._layouts: dict[object, tuple[torch.Tensor, ...]] = {}
        for module in model.modules():
            if type(getattr(module, "quant_method", None)) is UnquantizedLinearMethod:
                module.quant_method = PlainableLinearMethod()

    def are_packed(self) -> None:
        """vLLM has packed all weights; before that they are plain anyway."""
        self._packed = True

    @contextmanager
    def opener(self) -> Iterator[Callable[[str], None]]:
        """For the time of a load, a function that makes the parameter of a name writable.

        Raises:
            ValueError: a layer whose weights vLLM can replace as a whole only, of which a part has come.
        """
        if not self._packed:
            yield lambda name: None
            return
        for module in self._model.modules():
            if not _stays_packed(module):
                end_reload(module)
        try:
            yield self._open_parameter
            self._refuse_half_layers()
        finally:
            self._close()

    @contextmanager
    def all_plain(self) -> Iterator[None]:
        """For the time of a save, all parameters plain.

        Raises:
            ValueError: a layer's weights are packed in a form that can't be undone.
        """
        if not self._packed:
            yield
            return
        try:
            for name, module in self._model.named_modules():
                self._open_module(name, module)
            yield
        finally:
            self._leave_plain_tensors()
            self._close()

    def _open_parameter(self, name: str) -> None:
        module = self._model
        for part in name.split("."):
            child = getattr(module, part, None)
            if not isinstance(child, nn.Module):
                break
            module = getattr(child, "base_layer", child)  # within vLLM's LoRA layer
        self._open_module(name, getattr(module, "routed_experts", module))

    def _open_module(self, name: str, module: nn.Module) -> None:
        if module in self._open or is_reloading(module) or isinstance(module, Attention):
            return
        if _stays_packed(module):
            raise ValueError(
                f"{name}: vLLM has packed the quantised weights of this layer for this CPU, and they can't be made "
                "plain again. Replace them with reload_weights and a whole checkpoint, or start the engine anew."
            )
        method = _own_method(module)
        if isinstance(method, UnquantizedEmbeddingMethod):
            # The plain weight is kept beside the packed one, and is a tied head's too.
            self._open.update(m for m in self._model.modules() if _shares_weight(m, module))
        elif isinstance(method, PlainableLinearMethod):
            module.weight.data = method.plain(module)
            self._open.add(module)
        elif _has_packed_experts(module):
            self._unpack_experts(module)
            self._open.add(module)

    def _unpack_experts(self, layer: RoutedExperts) -> None:
        """Make ``w13_weight`` (E, 2F, D) and ``w2_weight`` (E, D, F) plain."""
        width = layer.intermediate_size_per_partition
        shapes = (2 * width, layer.hidden_size), (layer.hidden_size, width)
        key = type(_kernel(layer)), shapes, layer.w13_weight.dtype
        if key not in self._layouts:
            self._layouts[key] = _learn_layout(layer, shapes)
        stacks = layer.w13_weight, layer.w2_weight
        for stack, shape, places in zip(stacks, shapes, self._layouts[key], strict=True):
            flat = stack.data.view(stack.shape[0], -1)
            stack.data = flat.index_select(1, places).view(-1, *shape)

    def _leave_plain_tensors(self) -> None:
        """Let experts be packed in memory of their own: vLLM 0.33 packs in place, under whoever took the plain ones."""
        for module in self._open:
            if isinstance(module, RoutedExperts):
                for stack in (module.w13_weight, module.w2_weight):
                    stack.data = stack.data.clone()

    def _close(self) -> None:
        for module in self._open:
            if isinstance(module, RoutedExperts):
                module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)
            else:
                module.quant_method.process_weights_after_loading(module)
        self._open.clear()

    def _refuse_half_layers(self) -> None:
        half = [name for name, module in self._model.named_modules() if is_half_reloaded(module)]
        if half:
            raise ValueError(
                f"This update has only a part of the quantised weights of {', '.join(half)}; vLLM would leave the rest "
                "undefined. Send all tensors of a layer in one call of reload_weights."
            )


@contextmanager
def writable(model: nn.Module) -> Iterator[Callable[[str], None]]:
    """:meth:`PackedWeights.opener` of a model on a CPU; on a GPU all parameters are writable as they are.

    ``model.packed`` is its :class:`PackedWeights` or None.
    """
    if model.packed is None:
        yield lambda name: None
        return
    with model.packed.opener() as open_parameter:
        yield open_parameter


def _own_method(module: nn.Module) -> object:
    return module.__dict__.get("quant_method")  # a LoRA layer passes on its base layer's


def _stays_packed(module: nn.Module) -> bool:
    """Whether a module's weights, once packed, can't be made plain: they are quantised, or scales of attention."""
    if isinstance(module, RoutedExperts):
        return not isinstance(_kernel(module), CPUUnquantizedExperts)
    plain = PlainableLinearMethod, UnquantizedEmbeddingMethod, type(None)
    return isinstance(module, Attention) or not isinstance(_own_method(module), plain)


def _kernel(experts: RoutedExperts) -> object:
    return getattr(getattr(experts.quant_method, "moe_kernel", None), "fused_experts", None)


def _has_packed_experts(module: nn.Module) -> bool:
    """Whether the experts' kernel has a layout of its own; ours for adapters (``cpu_experts.py``) has none."""
    pack = CPUUnquantizedExperts.process_weights_after_loading
    return (
        isinstance(module, RoutedExperts)
        and type(_kernel(module)).process_weights_after_loading is pack
    )


def _shares_weight(module: nn.Module, other: nn.Module) -> bool:
    embeds = isinstance(_own_method(module), UnquantizedEmbeddingMethod)
    return embeds and module.weight is other.weight


def _learn_layout(
    layer: RoutedExperts, shapes: tuple[tuple[int, int], ...]
) -> tuple[torch.Tensor, ...]:
    """Where the kernel puts each element of an expert: for either stack its place in the packed expert, flat, int32.

    Learnt from the kernel itself, which is given the elements' positions to pack, one digit after another.

    Raises:
        ValueError: the kernel does more than move elements.
    """
    packed = layer.w13_weight, layer.w2_weight
    counts = [rows * columns for rows, columns in shapes]
    positions = [torch.zeros(stack[0].numel(), dtype=torch.int64) for stack in packed]
    place = 1
    while place <= max(counts):
        for name, shape, count in zip(("w13", "w2"), shapes, counts, strict=True):
            # From 1 on: what the kernel adds as padding is 0.
            digits = torch.arange(1, count + 1) // place % _BASE
            digits = digits.to(packed[0].dtype).view(1, *shape)
            setattr(layer, f"{name}_weight", nn.Parameter(digits, requires_grad=False))
        _kernel(layer).process_weights_after_loading(layer)
        for position, stack in zip(positions, (layer.w13_weight, layer.w2_weight), strict=True):
            position += stack.data.view(-1).long() * place
        place *= _BASE
    layer.w13_weight, layer.w2_weight = packed
    layout = []
    for position, count in zip(positions, counts, strict=True):
        used = position.nonzero().squeeze(1)
        places = torch.full((count,), -1, dtype=torch.int32)
        places[position[used] - 1] = used.int()
        if used.numel() != count or bool((places < 0).any()):
            raise ValueError(
                f"{type(_kernel(layer)).__name__} packs the weights of experts in a way that can't be undone. Start "
                "the engine anew with the other weights."
            )
        layout.append(places)
    return tuple(layout)
