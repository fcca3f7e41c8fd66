"""LoRA adapters: what SGLang asks of the model, and PEFT's adapters of LFM2-MoE in the form of SGLang's buffers.

SGLang fuses an adapter's factors as its layers fuse weights, by lists of names that LFM2-MoE's are not in, and finds
out that a factor fits nowhere when a request needs it. So subclasses that read adapters with ``lfm2_plugin.checkpoint``
take the place of its manager and its adapter class, by its own means for that: see
``docs/decisions/0008-adapters-in-sglang.md``. Buffers, slots, eviction and LoRA layers stay SGLang's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import (
    AdapterConfig,
    AdapterError,
    AdapterPart,
    read_adapter,
    read_adapter_config,
    read_adapter_tensors,
    unified,
)

from .cpu_lora import CpuExpertsWithLoRA
from .cpu_platform import LORA_BACKEND
from .cpu_torch import memory_needs_no_pinning
from .engine_api import (
    FusedMoE,
    LoRAAdapter,
    LoRAManager,
    get_parallel,
    replace_submodule,
)
from .replacements import replace_in_engine

_ATTENTION = frozenset({"qkv_proj", "out_proj"})
_CONV = frozenset({"in_proj", "out_proj"})
_DENSE = frozenset({"w13", "w2"})
_EXPERTS = frozenset({"gate_up_proj", "down_proj"})  # SGLang's names for stacks of experts
TARGETS = _ATTENTION | _CONV | _DENSE | _EXPERTS
"""The modules that adapters can be on, by the names that SGLang looks them up with."""

# What --lora-target-modules may say, beside "all" and the names above.
_UP, _DOWN = frozenset({"w13"}) | _EXPERTS, frozenset({"w2"}) | _EXPERTS
_SPELLINGS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), frozenset({"qkv_proj"})),
    **dict.fromkeys(("w1", "w3", "gate_proj", "up_proj", "gate_up_proj"), _UP),
    **dict.fromkeys(("w2", "down_proj"), _DOWN),
}

_SLICES = {"qkv_proj": 3, "in_proj": 3, "w13": 2, "gate_up_proj_moe": 2}
# Of which shards a fused module consists, in order.
_SHARDS: dict[str, tuple[str | int, ...]] = {"qkv_proj": ("q", "k", "v"), "w13": (0, 1)}


def slices(module: str) -> int:
    """Of how many matrices, each with a factor A, the module consists."""
    return _SLICES.get(module, 1)


def dimensions(arch: Lfm2MoeArch, module: str, layer: int) -> tuple[int, int]:
    """SGLang's "hidden dim": a module's inputs and outputs over all ranks; zeros where the layer has no such module."""
    D = arch.hidden_size
    heads = arch.num_heads * arch.head_dim
    is_attention = layer in arch.attention_layers
    none = (0, 0)
    if module == "qkv_proj":
        return (D, heads + 2 * arch.num_kv_heads * arch.head_dim) if is_attention else none
    if module == "out_proj":
        return (heads, D) if is_attention else (D, D)
    if module == "in_proj":
        return none if is_attention else (D, 3 * D)
    if layer < arch.num_dense_layers:
        if module == "w13":
            return D, 2 * arch.intermediate_size
        if module == "w2":
            # SGLang knows by name which modules are divided by input. This one it takes for one that is divided by
            # output, so it keeps the first number and divides the second.
            ranks = get_parallel().tp_size
            return arch.intermediate_size // ranks, D * ranks
        return none
    width = arch.moe_intermediate_size
    return {"gate_up_proj_moe": (D, 2 * width), "down_proj_moe": (width, D)}.get(module, none)


def targets_asked_for(names: Iterable[str] | None) -> set[str] | None:
    """``--lora-target-modules`` as names of ours; None if it isn't given.

    Raises:
        ValueError: a name of nothing that can be adapted.
    """
    if not names:
        return None
    wanted: set[str] = set()
    unknown = []
    for name in sorted(names):
        if name == "all":
            wanted |= TARGETS
        elif found := _SPELLINGS.get(name) or TARGETS & {name}:
            wanted |= found
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"--lora-target-modules names {', '.join(unknown)}, which adapters of LFM2-MoE can't be on; give 'all', or "
            f"some of {', '.join(sorted(TARGETS | _SPELLINGS.keys()))}."
        )
    return wanted


@dataclass(frozen=True)
class FusedFactors:
    """The factors of one of SGLang's modules.

    Attributes:
        layer: decoder layer.
        place: the module's name below the layer, and at its end the target.
        a: (slices * r, columns); of experts (E, slices * r, columns).
        b: (rows, r); of experts (E, rows, r).
    """

    layer: int
    place: str
    a: torch.Tensor
    b: torch.Tensor

    @property
    def target(self) -> str:
        return self.place.rpartition(".")[2]


def fuse(arch: Lfm2MoeArch, parts: Iterable[AdapterPart]) -> Iterator[FusedFactors]:
    """Put the factors of an adapter in its unified form together as the modules are."""
    modules: dict[tuple[int, str], list[AdapterPart]] = defaultdict(list)
    for part in parts:
        assert part.target.layer is not None  # nothing outside the layers can be adapted
        modules[part.target.layer, part.target.module].append(part)
    for (layer, place), members in modules.items():
        module = place.rpartition(".")[2]
        if module == "experts":
            up, gated, down = members  # w1, w3, w2
            a, b = (torch.cat(pair, dim=1) for pair in ((up.a, gated.a), (up.b, gated.b)))
            yield FusedFactors(layer, f"{place}.gate_up_proj", a, b)
            yield FusedFactors(layer, f"{place}.down_proj", down.a, down.b)
        elif module in _SHARDS:
            yield FusedFactors(layer, place, *_fuse_shards(arch, module, members))
        else:
            (part,) = members
            yield FusedFactors(layer, place, part.a.repeat(slices(module), 1), part.b)


def _fuse_shards(
    arch: Lfm2MoeArch, module: str, parts: list[AdapterPart]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A shard without an adapter gets factors of zeros."""
    kv = arch.num_kv_heads * arch.head_dim
    rows = {"q": arch.num_heads * arch.head_dim, "k": kv, "v": kv}
    there = {part.target.shard: part for part in parts}
    some = parts[0]
    a, b = [], []
    for shard in _SHARDS[module]:
        part = there.get(shard)
        height = rows[shard] if isinstance(shard, str) else arch.intermediate_size
        a.append(part.a if part else torch.zeros_like(some.a))
        b.append(part.b if part else some.b.new_zeros(height, some.b.shape[1]))
    return torch.cat(a), torch.cat(b)


def targets_of(parts: Iterable[AdapterPart]) -> set[str]:
    """The modules that the parts are on, by the names that SGLang looks them up with."""
    names = {part.target.module.rpartition(".")[2] for part in parts}
    return (names - {"experts"}) | (_EXPERTS if "experts" in names else set())


class Adapter(LoRAAdapter):
    """An adapter in the host's memory, every tensor accounted for; SGLang calls the two methods as it reads one.

    Raises:
        AdapterError: a tensor that can't be served.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._read: dict[str, torch.Tensor] = {}

    def _process_weight(self, name: str, loaded_weight: torch.Tensor) -> None:
        self._read[name] = loaded_weight.cpu()

    def _normalize_weights(self) -> None:
        arch, config = self.base_model.arch, AdapterConfig.from_dict(self.config.hf_config)
        parts = read_adapter(arch, config, self._read)
        self._read = {}
        for factors in fuse(arch, unified(arch, config, parts)):
            weights = self.layers[factors.layer].weights
            weights[f"layers.{factors.layer}.{factors.place}.lora_A.weight"] = factors.a
            weights[f"layers.{factors.layer}.{factors.place}.lora_B.weight"] = factors.b
        self.config.target_modules = sorted(targets_of(parts))


class AdapterManager(LoRAManager):
    """SGLang's manager of adapters, told what LFM2-MoE's are on."""

    def __init__(self, *args: Any, lora_backend: str, **kwargs: Any) -> None:
        on_cpu = next(kwargs["base_model"].parameters()).device.type == "cpu"
        if on_cpu and lora_backend != LORA_BACKEND:
            raise ValueError(
                f"--lora-backend {lora_backend} needs an accelerator. Leave the option out on a CPU."
            )
        with memory_needs_no_pinning():
            super().__init__(*args, lora_backend=lora_backend, **kwargs)

    def _load_lora_adapter(self, lora_ref: Any) -> Any:
        """By the headers of its files, before SGLang reads them; a name on the hub is checked as it is read."""
        folder = Path(lora_ref.lora_path)
        if not folder.is_dir() and not folder.is_absolute():
            return super()._load_lora_adapter(lora_ref)
        return self._if_fine(
            lambda: (read_adapter_config(folder), read_adapter_tensors(folder)),
            lambda: super(AdapterManager, self)._load_lora_adapter(lora_ref),
        )

    def load_lora_adapter_from_tensors(
        self,
        lora_ref: Any,
        tensors: dict[str, torch.Tensor],
        config_dict: dict[str, Any],
        *more: Any,
        **options: Any,
    ) -> Any:
        """The same for an adapter that comes as tensors."""
        return self._if_fine(
            lambda: (AdapterConfig.from_dict(config_dict), tensors),
            lambda: super(AdapterManager, self).load_lora_adapter_from_tensors(
                lora_ref, tensors, config_dict, *more, **options
            ),
        )

    def _if_fine(
        self,
        read: Callable[[], tuple[AdapterConfig, Mapping[str, torch.Tensor]]],
        load: Callable[[], Any],
    ) -> Any:
        """Load an adapter if it can be served; an answer that says why not otherwise, and nothing has changed."""
        try:
            config, tensors = read()
            parts = read_adapter(self.base_model.arch, config, tensors)
            self._check_buffers(targets_of(parts))
        except AdapterError as error:
            return self.create_lora_update_result(success=False, error_message=str(error))
        return load()

    def _check_buffers(self, targets: set[str]) -> None:
        """Refuse an adapter that comes while serving and is on modules that have no buffers."""
        absent = targets - self.target_modules if hasattr(self, "memory_pool") else ()
        if absent:
            raise AdapterError(
                f"It is on {', '.join(sorted(absent))}, for which no room was made at start. Start the server with "
                "--lora-target-modules all."
            )

    def validate_new_adapter(self, lora_config: Any, lora_ref: Any) -> None:
        """In its unified form: one rank, and no scaling."""
        config = AdapterConfig.from_dict(lora_config.hf_config)
        lora_config.r = lora_config.lora_alpha = config.largest_rank
        lora_config.target_modules = []  # its tensors say better, see Adapter
        super().validate_new_adapter(lora_config, lora_ref)

    def init_lora_shapes(
        self, max_lora_rank: int | None = None, target_modules: Iterable[str] | None = None
    ) -> None:
        super().init_lora_shapes(max_lora_rank, targets_asked_for(target_modules))

    def set_lora_module(self, module_name: str, module: Any, **kwargs: Any) -> Any:
        """SGLang's layer around the module; around experts on a CPU ours."""
        if self.device.type != "cpu" or not isinstance(module, FusedMoE):
            return super().set_lora_module(module_name, module, **kwargs)
        adapted = CpuExpertsWithLoRA(module, self.lora_backend, **kwargs)
        replace_submodule(self.base_model, module_name, adapted)
        return adapted


def serve_adapters() -> None:
    """Have SGLang use the two classes, in this process; the model calls it when it is built with LoRA on."""
    replace_in_engine(LoRAAdapter=Adapter, LoRAManager=AdapterManager)
