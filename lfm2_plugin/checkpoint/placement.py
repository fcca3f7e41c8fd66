"""Where a tensor of the hub goes in an engine's model. Both engines' layers are named alike but for a few modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lfm2_plugin.checkpoint.names import EXPERTS, Target, translate

_OUTSIDE_LAYERS = {"embed_tokens": "model.embed_tokens", "embedding_norm": "model.embedding_norm"}


@dataclass(frozen=True)
class Place:
    """A parameter of an engine's model, and which part of it.

    Attributes:
        layer: decoder layer; None outside the layers.
        parameter: its full name.
        shard: of a fused linear "q", "k", "v" or 0, 1; of experts "w1", "w2", "w3"; else None.
        expert: which one; None for what is no expert's.
    """

    layer: int | None
    parameter: str
    shard: str | int | None
    expert: int | None


def place(name: str, renamed: Mapping[str, str]) -> Place | None:
    """Where the tensor ``name`` of the hub goes; None if LFM2-MoE has no such tensor.

    Args:
        name: experts one by one, as :meth:`Ledger.enter` hands them out.
        renamed: module of a :class:`Target` -> the engine's name for it, below the layer.
    """
    target = translate(name)
    if target is None:
        return None
    if target.layer is None:
        module = _OUTSIDE_LAYERS.get(target.module, target.module)
    else:
        module = f"model.layers.{target.layer}.{renamed.get(target.module, target.module)}"
    return Place(target.layer, f"{module}{_last(target)}", target.shard, target.expert)


def _last(target: Target) -> str:
    """The last part of the parameter's name, with what joins it to the module."""
    if target.module == "feed_forward.expert_bias":
        return ""
    if target.module == EXPERTS:
        return f".{'w2' if target.shard == 'w2' else 'w13'}_{target.parameter}"
    return f".{target.parameter}"
