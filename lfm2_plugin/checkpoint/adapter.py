"""What a LoRA adapter of LFM2-MoE contains, as PEFT writes it: the factors of each module, every tensor accounted for.

Names and shapes come from the table of checkpoint names. The experts of a layer are in one of two forms. PEFT on
transformers 5, where they are stacked parameters, packs the factors of all experts into one pair of matrices per stack
and names the pair after its own nesting (``experts.base_layer`` and ``experts``), so that only shapes tell which is
which. Before, each expert had modules w1, w2 and w3, and factors under their names. :func:`unified` makes one form of
both.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint.adapter_config import AdapterConfig, AdapterError
from lfm2_plugin.checkpoint.names import (
    STACKED,
    Target,
    expected_tensors,
    optional_tensors,
    translate,
)

EXPERTS = "feed_forward.experts"
EMBEDDING = "embed_tokens"
ADAPTABLE = frozenset(
    {
        "self_attn.qkv_proj",
        "self_attn.out_proj",
        "conv.in_proj",
        "conv.out_proj",
        "feed_forward.w13",
        "feed_forward.w2",
        EXPERTS,
    }
)
"""The modules of a :class:`Target` that an adapter may be on, whatever the engine."""
_IN_WORDS = "q_proj, k_proj, v_proj, out_proj, in_proj, w1, w2, w3 and the experts"
_LISTED = 6  # names in an error
_WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?([AB])(?:\.default)?(?:\.weight)?"
)
_STACK = re.compile(r"model\.layers\.(\d+)\.feed_forward\.experts(?:\.base_layer)*")
# PEFT saves these two with the adapter when it is on them; they are the base model's.
_BASE = re.compile(r"(?:base_model\.model\.)?(model\.embed_tokens|lm_head)\.base_layer(\.weight)")


@dataclass(frozen=True)
class AdapterPart:
    """The factors of one module: its weight gains ``scaling * B @ A``, that of the embedding the transpose of it.

    Attributes:
        target: the module, ``parameter`` "weight"; of experts the shard is "w1", "w2" or "w3", ``expert`` which one, or
            None for the factors of all.
        a: (r, columns); of all experts (E, r, columns).
        b: (rows, r); of all experts (E, rows, r).
        scaling: the module's.
    """

    target: Target
    a: torch.Tensor
    b: torch.Tensor
    scaling: float = 1.0


def read_adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in an adapter's folder, mapped from the file: nothing is read before it is used.

    Raises:
        AdapterError: there is no such file, or it is damaged.
    """
    path = next((folder / name for name in _WEIGHTS_FILES if (folder / name).is_file()), None)
    if path is None:
        raise AdapterError(f"There is no {_WEIGHTS_FILES[0]} in {folder}. Save the adapter again.")
    try:
        if path.suffix != ".safetensors":
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return {name: tensor for name, tensor in loaded.items() if torch.is_tensor(tensor)}
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise AdapterError(
            f"Its {path.name} is damaged: {reason}. Copy or save it again."
        ) from error


def read_adapter(
    arch: Lfm2MoeArch,
    config: AdapterConfig,
    tensors: Mapping[str, torch.Tensor],
    adaptable: Collection[str] = ADAPTABLE,
) -> list[AdapterPart]:
    """Sort an adapter's tensors into the modules that they are for. Of values only NaN and infinity are looked for.

    Args:
        arch: the model that it is to be served with.
        config: its settings.
        tensors: name on disk -> tensor.
        adaptable: the modules that the engine can adapt.

    Raises:
        AdapterError: a tensor that is no factor, is for a module that can't be adapted or for another model, lacks its
            other half, or holds NaN or infinity.
    """
    shapes = expected_tensors(arch) | optional_tensors(arch)
    pairs = _pairs(tensors, shapes)
    unknown = [m for m in pairs if not (_STACK.fullmatch(m) or _is_in(m, shapes, adaptable))]
    _refuse(
        unknown,
        "is on modules that can't be adapted",
        f"Train it on {_IN_WORDS} of this model, or merge it into the model",
    )
    parts = []
    for module, pair in pairs.items():
        if stack := _STACK.fullmatch(module):
            parts += _stacked(arch, config, int(stack[1]), module, pair["A"], pair["B"])
            continue
        rank, scaling = config.of(module)
        rows, columns = shapes[f"{module}.weight"]
        target = _target(module)
        if target.module == EMBEDDING:
            rows, columns = columns, rows
        _check_shapes(module, pair, (rank, columns), (rows, rank))
        parts.append(AdapterPart(target, pair["A"], pair["B"], scaling))
    _check_once(parts)
    # One NaN would make every answer with the adapter nonsense, without an error.
    wild = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    _refuse(wild, "has NaN or infinity in", "Take an earlier state of its training")
    return parts


def unified(
    arch: Lfm2MoeArch, config: AdapterConfig, parts: Iterable[AdapterPart]
) -> list[AdapterPart]:
    """The same adapter in the form of an engine, which knows one rank and one scaling for all of it.

    Returns:
        Parts of the adapter's largest rank, zeros beyond their own, with ``scaling`` 1 and their own in B. A layer with
        factors of experts has one part each for w1, w3 and w2, of all experts, zeros where the adapter has none.
    """
    rank = config.largest_rank
    done, experts = [], defaultdict(list)
    for part in parts:
        part = _padded(part, rank)
        if part.target.module == EXPERTS:
            assert part.target.layer is not None
            experts[part.target.layer].append(part)
        else:
            done.append(part)
    for members in experts.values():
        done += [_of_all_experts(arch, rank, shard, members) for shard in ("w1", "w3", "w2")]
    return done


def _pairs(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, torch.Tensor]]:
    pairs: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    strange, twice = [], []
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is not None:
            if match[2] in pairs[match[1]]:
                twice.append(name)
            pairs[match[1]][match[2]] = tensor
        elif not _is_of_base(name, tensor, shapes):
            strange.append(name)
    _refuse(strange, "has tensors that are no LoRA factors", "Save the adapter alone")
    _refuse(twice, "has factors under two names", "Save one adapter in a folder")
    halves = [module for module, pair in pairs.items() if len(pair) < 2]
    _refuse(halves, "has only one of the factors A and B of", "Save it again")
    dtypes = [f"{n} ({t.dtype})" for n, t in tensors.items() if t.dtype not in _DTYPES]
    _refuse(dtypes, "has factors that are neither float32 nor float16 nor bfloat16", "Convert it")
    if not pairs:
        raise AdapterError("It has no LoRA factors. Save it again.")
    return pairs


def _is_of_base(name: str, tensor: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    match = _BASE.fullmatch(name)
    return match is not None and tuple(tensor.shape) == shapes.get(match[1] + match[2])


def _refuse(names: list[str], what: str, remedy: str) -> None:
    if names:
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        raise AdapterError(f"It {what}: {', '.join(sorted(names)[:_LISTED])}{more}. {remedy}.")


def _target(module: str) -> Target:
    target = translate(f"{module}.weight")
    assert target is not None  # _is_in has looked
    return target


def _is_in(module: str, shapes: Mapping[str, tuple[int, ...]], adaptable: Collection[str]) -> bool:
    name = f"{module}.weight"
    return name in shapes and _target(module).module in adaptable


def _check_shapes(
    module: str, pair: Mapping[str, torch.Tensor], a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    found = tuple(pair["A"].shape), tuple(pair["B"].shape)
    if found != (a, b):
        raise AdapterError(
            f"Its factors A and B of {module} are {found[0]} and {found[1]}, for this model they must be {a} and {b}. "
            "It was trained on another model, or its adapter_config.json names another rank."
        )


def _check_once(parts: Iterable[AdapterPart]) -> None:
    """Factors of all experts and of one of them don't go together."""
    seen: dict[tuple[int | None, str | int | None], list[int | None]] = defaultdict(list)
    for part in parts:
        if part.target.module == EXPERTS:
            seen[part.target.layer, part.target.shard].append(part.target.expert)
    twice = [
        f"{shard} in layer {layer}"
        for (layer, shard), experts in seen.items()
        if len(experts) > (1 if None in experts else len(set(experts)))
    ]
    _refuse(twice, "has factors of the experts' matrices twice", "Save it again")


def _stacked(
    arch: Lfm2MoeArch,
    config: AdapterConfig,
    layer: int,
    module: str,
    a: torch.Tensor,
    b: torch.Tensor,
) -> list[AdapterPart]:
    """The factors of all experts of a layer out of PEFT's A (E * r, columns) and B (rows, r * E)."""
    E = arch.num_experts
    shapes = {str(row.shard): row.shape(arch) for row in STACKED}
    is_moe = arch.num_dense_layers <= layer < arch.num_layers
    fits = []
    for row in STACKED if is_moe else ():
        rank, scaling = config.of(f"model.layers.{layer}.{row.source}")
        _, rows, columns = row.shape(arch)
        for transposed in (False, True):
            height, width = (columns, rows) if transposed else (rows, columns)
            if (tuple(a.shape), tuple(b.shape)) == ((E * rank, width), (height, rank * E)):
                fits.append((str(row.shard), transposed, rank, scaling))
    if not fits:
        raise AdapterError(
            f"Its factors {tuple(a.shape)} and {tuple(b.shape)} of {module} fit neither stack of experts of this model "
            f"({shapes['w13']} and {shapes['w2']}, rank {config.rank}). It was trained on another model."
        )
    # Of a square stack both ways fit.
    shard, transposed, rank, scaling = next(
        (fit for fit in fits if fit[1] == config.transposed), fits[0]
    )
    a = a.reshape(E, rank, -1)
    by_expert = b.unflatten(1, (E, rank)).transpose(1, 2)
    b = (by_expert if config.grouped_by_expert else b.unflatten(1, (rank, E))).permute(2, 0, 1)
    if transposed:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    target = Target(layer, EXPERTS, "weight", shard)
    if shard == "w2":
        return [AdapterPart(target, a, b, scaling)]
    return [
        AdapterPart(replace(target, shard=half), a, rows, scaling)
        for half, rows in zip(("w1", "w3"), b.chunk(2, dim=1), strict=True)
    ]


def _padded(part: AdapterPart, rank: int) -> AdapterPart:
    a, b = part.a, part.b
    if part.scaling != 1:
        b = b * part.scaling
    if missing := rank - a.shape[-2]:
        a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    return AdapterPart(part.target, a, b)


def _of_all_experts(
    arch: Lfm2MoeArch, rank: int, shard: str, parts: list[AdapterPart]
) -> AdapterPart:
    mine = [part for part in parts if part.target.shard == shard]
    if len(mine) == 1 and mine[0].target.expert is None:
        return mine[0]
    D, width = arch.hidden_size, arch.moe_intermediate_size
    rows, columns = (D, width) if shard == "w2" else (width, D)
    a = parts[0].a.new_zeros(arch.num_experts, rank, columns)
    b = parts[0].b.new_zeros(arch.num_experts, rows, rank)
    for part in mine:
        assert part.target.expert is not None  # _check_once has looked
        a[part.target.expert], b[part.target.expert] = part.a, part.b
    return AdapterPart(replace(parts[0].target, shard=shard, expert=None), a, b)
