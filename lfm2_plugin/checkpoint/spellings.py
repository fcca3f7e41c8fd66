"""The other ways in which the tensors of LFM2-MoE are named and shaped, each brought to those of ``names.py``.

The hub has every expert's ``w1``, ``w2`` and ``w3`` by itself. transformers 5 holds the experts of a layer stacked, and
whoever sends its parameters to a serving engine (reinforcement learning) sends them so; llm-compressor writes experts
one by one as ``gate_proj``, ``up_proj`` and ``down_proj``; others join ``w1`` and ``w3``. All of these are taken apart
here, once, before an engine's loader sees a tensor.

A stack is (experts, rows, columns) with the rows of ``w1`` before those of ``w3``, as in transformers. A transposed one
of a model whose sizes are equal can't be told from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint.names import WEIGHT, Shape, expected_tensors

_PARTS = {
    "gate_up_proj": ("w1", "w3"),
    "w13": ("w1", "w3"),
    "gate_proj": ("w1",),
    "w1": ("w1",),
    "up_proj": ("w3",),
    "w3": ("w3",),
    "down_proj": ("w2",),
    "w2": ("w2",),
}
"""Name of a matrix, of one expert or of all -> the hub's matrices in it, in the order of their rows."""

_FEED_FORWARD = r"model\.layers\.\d+\.feed_forward"
_MATRIX = re.compile(rf"({_FEED_FORWARD}\.(?:experts\.\d+\.)?)(\w+_proj|w13)\.(\w+)")
_STACK = re.compile(rf"({_FEED_FORWARD}\.experts\.)({'|'.join(_PARTS)})(?:[._]weight)?")


_OTHER = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_HUB = {other: hub for hub, other in _OTHER.items()}


def alternate(module: str) -> str:
    """llm-compressor's name of a module of the hub's; most have only one."""
    place, _, last = module.rpartition(".")
    return f"{place}.{_OTHER[last]}" if last in _OTHER else module


def hub_name(module: str) -> str:
    """The hub's name of a module that a checkpoint may call as llm-compressor does."""
    place, _, last = module.rpartition(".")
    return f"{place}.{_HUB[last]}" if last in _HUB and ".feed_forward." in module else module


@dataclass(frozen=True)
class Spelling:
    """How a tensor of a checkpoint becomes tensors of the hub.

    Attributes:
        names: of the hub, in the order in which they lie in the tensor.
        shape: of one of them; None where it is not the spelling's to say (the tensor is one of the hub's under another
            name, or it is quantised).
        whole: of the tensor that holds them all; None likewise.
    """

    names: tuple[str, ...]
    shape: Shape | None = None
    whole: Shape | None = None

    def pieces(self, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """(name, tensor) of each, as views of ``tensor``, which has the shape ``whole``."""
        if self.shape is None:
            return [(self.names[0], tensor)]
        parts = tensor.reshape(len(self.names), *self.shape).unbind()
        return list(zip(self.names, parts, strict=True))


class Spellings:
    """What names and shapes a checkpoint of one model may use.

    Args:
        arch: the model.
    """

    def __init__(self, arch: Lfm2MoeArch) -> None:
        self._experts = arch.num_experts
        self._shapes = expected_tensors(arch)

    def read(self, name: str, shape: Shape) -> Spelling:
        """How to read the tensor called ``name``; one that is unknown stays what it is."""
        if match := _STACK.fullmatch(name):
            places = [f"{match[1]}{expert}." for expert in range(self._experts)]
            return self._joined(name, places, _PARTS[match[2]], (self._experts,))
        if (match := _MATRIX.fullmatch(name)) and match[2] in _PARTS:
            parts = _PARTS[match[2]]
            if len(parts) == 1:
                return Spelling((f"{match[1]}{parts[0]}.{match[3]}",))
            if match[3] == WEIGHT:
                return self._joined(name, [match[1]], parts, ())
        needed = self._shapes.get(name, ())
        if shape != needed and len(needed) == 3 and shape == (needed[0], *needed[2:]):
            return Spelling((name,), needed, shape)  # a convolution without the dimension that is 1
        return Spelling((name,))

    def _joined(
        self, name: str, places: list[str], parts: tuple[str, ...], stacked: Shape
    ) -> Spelling:
        names = tuple(f"{place}{part}.{WEIGHT}" for place in places for part in parts)
        shape = self._shapes.get(names[0])
        if shape is None:
            return Spelling((name,))  # of a layer without experts, or without a dense MLP
        rows, *columns = shape
        return Spelling(names, shape, (*stacked, len(parts) * rows, *columns))
