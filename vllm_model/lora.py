"""LoRA adapters in vLLM: read and checked with ``lfm2_plugin.checkpoint`` before a step can meet them.

vLLM reads an adapter by names alone. Factors of one stack of experts end in an assertion inside a step, which ends the
engine; factors on a module without a LoRA layer are dropped without a word. So two of its classes give way to the
subclasses here: the one in each worker that reads adapters, and the one in the user's process that sees each request
before the engine does. See ``docs/decisions/0017-adapters-in-vllm.md``. Buffers, slots, eviction and LoRA layers stay
vLLM's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import (
    AdapterConfig,
    AdapterError,
    AdapterPart,
    Target,
    read_adapter,
    read_adapter_config,
    read_adapter_tensors,
    unified,
)
from lfm2_plugin.register import ARCHITECTURE

from .engine_api import (
    InputProcessor,
    LoRAAdapterNotFoundError,
    LoRALayerWeights,
    LoRAModel,
    LoRARequest,
    LRUCacheWorkerLoRAManager,
    PackedLoRALayerWeights,
    VllmConfig,
    get_adapter_absolute_path,
    is_in_target_modules,
)
from .replacements import replace_in_engine
from .weights import LORA_NAMES

EXPERTS = "feed_forward.experts"
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "w13": ["w1", "w3"], "in_proj": ["in_proj"]}
"""Which modules of an adapter a module of the model consists of, as vLLM wants to know."""


def read_for(
    vllm_config: VllmConfig, name: str, folder: Path
) -> tuple[AdapterConfig, list[AdapterPart]]:
    """Read an adapter from its folder, and check that this engine can serve it.

    Raises:
        AdapterError: it can't be served; names the adapter, what is wrong and what to do.
    """
    arch = Lfm2MoeArch.from_config(vllm_config.model_config.hf_config)
    try:
        config = read_adapter_config(folder)
        parts = read_adapter(arch, config, read_adapter_tensors(folder))
        _check_options(vllm_config, config, parts)
    except AdapterError as error:
        raise AdapterError(f"LoRA adapter {name!r} ({folder}) can't be served. {error}") from error
    return config, parts


def _check_options(
    vllm_config: VllmConfig, config: AdapterConfig, parts: Iterable[AdapterPart]
) -> None:
    lora, rank = vllm_config.lora_config, config.largest_rank
    if rank > lora.max_lora_rank:
        raise AdapterError(
            f"Its rank {rank} is above --max-lora-rank {lora.max_lora_rank}; start with more."
        )
    if lora.fully_sharded_loras and rank % vllm_config.parallel_config.tensor_parallel_size:
        raise AdapterError(
            f"Its rank {rank} can't be divided over the ranks of --tensor-parallel-size, as --fully-sharded-loras "
            "wants. Leave that option out."
        )
    modules = {runtime_name(part.target) for part in parts}
    if lora.enable_moe_shared_loras and any(name.endswith(EXPERTS) for name in modules):
        raise AdapterError(
            "It is on experts, and --enable-moe-shared-loras has room for factors that all experts share only. Leave "
            "that option out."
        )
    absent = {
        name.rpartition(".")[2]
        for name in modules
        if not is_in_target_modules(name, lora.target_modules, PACKED)
    }
    if absent:
        raise AdapterError(
            f"It is on {', '.join(sorted(absent))}, for which --lora-target-modules makes no room. Add them, or leave "
            "the option out."
        )


def runtime_name(target: Target) -> str:
    """The module of the model that an adapter's part is for."""
    name = f"model.layers.{target.layer}.{target.module}"
    for theirs, ours in LORA_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def factors_name(target: Target) -> str:
    """Under which name vLLM looks for a part's factors: the module's, or its place in a packed module."""
    name = runtime_name(target)
    parent, _, module = name.rpartition(".")
    if module == "qkv_proj":
        return f"{parent}.{target.shard}_proj"
    if module == "w13":
        return f"{parent}.{PACKED['w13'][int(target.shard or 0)]}"
    return name


def lora_model(
    arch: Lfm2MoeArch,
    config: AdapterConfig,
    parts: Iterable[AdapterPart],
    number: int,
    dtype: torch.dtype,
) -> LoRAModel:
    """An adapter as vLLM keeps it in the host's memory.

    ``number`` is vLLM's id of it, ``dtype`` that of the buffers.
    """
    rank = config.largest_rank
    layers: dict[str, LoRALayerWeights] = {}
    experts: dict[str, dict[Any, tuple[torch.Tensor, torch.Tensor]]] = defaultdict(dict)
    for part in unified(arch, config, parts):
        name = factors_name(part.target)
        # A copy: what was read is mapped from a file that may change.
        a, b = (
            factor.to(dtype, copy=True, memory_format=torch.contiguous_format)
            for factor in (part.a, part.b)
        )
        if part.target.module == EXPERTS:
            experts[name][part.target.shard] = a, b
        else:
            layers[name] = LoRALayerWeights(name, rank, rank, a, b, scaling=1.0)
    for name, shards in experts.items():
        a, b = ([shards[shard][side] for shard in ("w1", "w2", "w3")] for side in (0, 1))
        layers[name] = PackedLoRALayerWeights(name, rank, [rank] * 3, a, b, scaling=[1.0] * 3)
    return LoRAModel(number, rank, layers)


class AdapterManager(LRUCacheWorkerLoRAManager):
    """A worker's manager of adapters, which reads those of LFM2-MoE itself."""

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        self._vllm_config = vllm_config
        self._arch = getattr(model, "arch", None)
        if isinstance(self._arch, Lfm2MoeArch):
            model.adapters_are_checked = True
        return super().create_lora_manager(model, vllm_config)

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        if not isinstance(self._arch, Lfm2MoeArch):
            return super()._load_adapter(lora_request)
        folder = existing_folder(lora_request)
        config, parts = read_for(self._vllm_config, lora_request.lora_name, folder)
        return lora_model(
            self._arch, config, parts, lora_request.lora_int_id, self.lora_config.lora_dtype
        )


class CheckedInputs(InputProcessor):
    """What turns prompts into requests, in the user's process; refuses an adapter before the engine hears of it.

    An adapter that was loaded into the engine beforehand (``add_lora``, as vLLM's server does) was checked there.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        lora = vllm_config.lora_config is not None
        self._checks = lora and vllm_config.model_config.architecture == ARCHITECTURE
        self._checked: dict[str, object] = {}

    def process_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's.

        Raises:
            AdapterError: the request's adapter can't be served.
        """
        for value in (*args, *kwargs.values()):
            if isinstance(value, LoRARequest) and self._checks:
                self._check(value)
        return super().process_inputs(*args, **kwargs)

    def _check(self, request: LoRARequest) -> None:
        """Once for each state of a folder. One that has gone since may still be in the engine."""
        path = request.lora_path
        if path in self._checked and not Path(path).is_dir():
            return
        folder = existing_folder(request)
        files = sorted(folder.glob("adapter_*"))
        state = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
        if self._checked.get(path) != state:
            read_for(self.vllm_config, request.lora_name, folder)
            self._checked[path] = state


class CheckedServerInputs(CheckedInputs):
    """The same in a server, whose engine may see folders that this process doesn't."""

    def _check(self, request: LoRARequest) -> None:
        if Path(request.lora_path).is_dir():
            super()._check(request)


def existing_folder(request: LoRARequest) -> Path:
    """The adapter's folder, downloaded if it is a name on the hub.

    Raises:
        LoRAAdapterNotFoundError: there is none.
    """
    folder = Path(get_adapter_absolute_path(request.lora_path))
    if not folder.is_dir():
        raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
    return folder


def check_adapters_of_requests() -> None:
    """Have vLLM's engines in this process take the checking classes."""
    replace_in_engine(
        "vllm.v1.engine.llm_engine", "LLMEngine.__init__", InputProcessor, CheckedInputs
    )
    replace_in_engine(
        "vllm.v1.engine.async_llm", "AsyncLLM.__init__", InputProcessor, CheckedServerInputs
    )


def read_adapters_in_workers() -> None:
    """Have vLLM's runners in this process take :class:`AdapterManager`."""
    replace_in_engine(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin.load_lora_model",
        LRUCacheWorkerLoRAManager,
        AdapterManager,
    )
