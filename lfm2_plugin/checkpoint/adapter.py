"""What a LoRA adapter of LFM2-MoE contains, as PEFT writes it: the factors of each module, every tensor accounted for.

Names and shapes come from the table of checkpoint names. The experts of a layer are in one of two forms. PEFT on
transformers 5, where they are stacked parameters, packs the factors of all experts into one pair of matrices per stack
and names the pair after its own nesting (``experts.base_layer`` and ``experts``), so that only shapes tell which is
which. Before, each expert had modules w1, w2 and w3, and factors under their names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint.names import STACKED, Target, expected_tensors, translate

ADAPTABLE = frozenset(
    {
        "self_attn.qkv_proj",
        "self_attn.out_proj",
        "conv.in_proj",
        "conv.out_proj",
        "feed_forward.w13",
        "feed_forward.w2",
        "feed_forward.experts",
    }
)
"""The modules of a :class:`Target` that an adapter may be on."""
_IN_WORDS = "q_proj, k_proj, v_proj, out_proj, in_proj, w1, w2, w3 and the experts"
_LISTED = 6  # names in an error

_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?([AB])(?:\.default)?(?:\.weight)?"
)
_STACK = re.compile(r"model\.layers\.(\d+)\.feed_forward\.experts(?:\.base_layer)*")

# Settings that change what the factors mean, and the values that leave them as they are.
_PLAIN = {
    "use_dora": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
}


class AdapterError(ValueError):
    """The adapter can't be served right; the text says why and what to do."""


@dataclass(frozen=True)
class AdapterPart:
    """The factors of one module: its weight gains ``scaling * B @ A``.

    Attributes:
        target: the module, ``parameter`` "weight"; of stacked experts the shard is "w13" or "w2".
        a: (r, columns); of stacked experts (E, r, columns).
        b: (rows, r); of stacked experts (E, rows, r).
    """

    target: Target
    a: torch.Tensor
    b: torch.Tensor


def adapter_scaling(config: Mapping[str, Any]) -> float:
    """What multiplies ``B @ A``, from an ``adapter_config.json``.

    Raises:
        AdapterError: not LoRA, or LoRA with something that isn't served.
    """
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise AdapterError(f"It is of type {kind or 'unknown'!r}; only LORA can be served.")
    set_here = [name for name, plain in _PLAIN.items() if config.get(name) not in plain]
    if set_here:
        raise AdapterError(
            f"It was trained with {', '.join(set_here)}, which can't be served. Merge it into the model "
            "(merge_and_unload in PEFT), or train it without."
        )
    rank = config["r"]
    return config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)


def read_adapter(
    arch: Lfm2MoeArch, rank: int, tensors: Mapping[str, torch.Tensor]
) -> list[AdapterPart]:
    """Sort an adapter's tensors into the modules that they are for.

    Args:
        arch: the model that it is to be served with.
        rank: r of its config.
        tensors: name on disk -> tensor.

    Raises:
        AdapterError: a tensor that is no factor, is for a module that can't be adapted or for another model, or lacks
            its other half.
    """
    pairs: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    strange = []
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            strange.append(name)
        else:
            pairs[match[1]][match[2]] = tensor
    _refuse(strange, "has tensors that are no LoRA factors", "Save the adapter alone")
    halves = [module for module, pair in pairs.items() if len(pair) < 2]
    _refuse(halves, "has only one of the factors A and B of", "Save it again")
    shapes = expected_tensors(arch)
    unknown = [m for m in pairs if not (_STACK.fullmatch(m) or _is_adaptable(m, shapes))]
    _refuse(
        unknown,
        "is on modules that can't be adapted",
        f"Train it on {_IN_WORDS} of this model, or merge it into the model",
    )
    parts = []
    for module, pair in pairs.items():
        if stack := _STACK.fullmatch(module):
            parts.append(_stacked(arch, rank, int(stack[1]), module, pair["A"], pair["B"]))
            continue
        rows, columns = shapes[f"{module}.weight"]
        _check_shapes(module, pair, (rank, columns), (rows, rank))
        parts.append(AdapterPart(_target(module), pair["A"], pair["B"]))
    return parts


def _refuse(names: list[str], what: str, remedy: str) -> None:
    if names:
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        raise AdapterError(f"It {what}: {', '.join(sorted(names)[:_LISTED])}{more}. {remedy}.")


def _target(module: str) -> Target:
    target = translate(f"{module}.weight")
    assert target is not None  # _is_adaptable has looked
    return target


def _is_adaptable(module: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    name = f"{module}.weight"
    return name in shapes and _target(module).module in ADAPTABLE


def _check_shapes(
    module: str, pair: Mapping[str, torch.Tensor], a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    found = tuple(pair["A"].shape), tuple(pair["B"].shape)
    if found != (a, b):
        raise AdapterError(
            f"Its factors A and B of {module} are {found[0]} and {found[1]}, for this model they must be {a} and {b}. "
            "It was trained on another model, or its config.json names another rank."
        )


def _stacked(
    arch: Lfm2MoeArch, rank: int, layer: int, module: str, a: torch.Tensor, b: torch.Tensor
) -> AdapterPart:
    """The factors of all experts of a layer out of PEFT's A (E * r, columns) and B (rows, r * E)."""
    shapes = {str(row.shard): row.shape(arch) for row in STACKED}
    experts = arch.num_experts
    for shard, (_, rows, columns) in shapes.items():
        fits = tuple(a.shape) == (experts * rank, columns) and tuple(b.shape) == (
            rows,
            rank * experts,
        )
        if fits and arch.num_dense_layers <= layer < arch.num_layers:
            return AdapterPart(
                Target(layer, "feed_forward.experts", "weight", shard),
                a.reshape(experts, rank, columns),
                b.reshape(rows, rank, experts).permute(2, 0, 1),
            )
    raise AdapterError(
        f"Its factors {tuple(a.shape)} and {tuple(b.shape)} of {module} fit neither stack of experts of this model "
        f"({shapes['w13']} and {shapes['w2']}, rank {rank}). It was trained on another model."
    )
