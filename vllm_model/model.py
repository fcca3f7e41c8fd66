"""LFM2-MoE in vLLM: the model of ``lfm2_plugin/reference.py``, layer for layer, made of vLLM's layers.

The class keeps the name of vLLM's own, which it replaces: everything that vLLM keys by architecture stays in force.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn

from lfm2_plugin.arch import Lfm2MoeArch

from .attention import Lfm2MoeAttention
from .conv_state import ConvStatePage, page_shape, pages_of_stage
from .cpu_weights import PackedWeights
from .engine_api import (
    EagleModelMixin,
    HasInnerState,
    IntermediateTensors,
    IsHybrid,
    LogitsProcessor,
    MambaStateCopyFunc,
    MixtureOfExperts,
    ParallelLMHead,
    PPMissingLayer,
    RMSNorm,
    SupportsEagle,
    SupportsEagle3,
    SupportsLoRA,
    SupportsPP,
    SupportsQuant,
    VllmConfig,
    VocabParallelEmbedding,
    WeightsMapper,
    conv_copy_funcs,
    conv_state_dtypes,
    expert_ranks,
    extract_layer_index,
    get_pp_group,
    init_logger,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
    on_cpu,
    pipeline_stages,
    support_torch_compile,
)
from .feed_forward import Lfm2MoeExperts, Lfm2MoeMlp
from .lora import PACKED, read_adapters_in_workers
from .short_conv import Lfm2ShortConv
from .support import check_support, named_without_kernel
from .weights import LORA_NAMES, check_files, load_weights

logger = init_logger("vllm.lfm2_plugin")


class Lfm2MoeDecoderLayer(nn.Module):
    """norm -> attention or short convolution -> norm -> dense MLP or experts, each added to the residual."""

    def __init__(
        self,
        arch: Lfm2MoeArch,
        page: tuple[ConvStatePage, int] | None,
        vllm_config: VllmConfig,
        prefix: str,
    ) -> None:
        super().__init__()
        quant_config = vllm_config.quant_config
        index = extract_layer_index(prefix)
        self.is_attention = page is None
        if page is None:
            self.self_attn = Lfm2MoeAttention(
                arch, vllm_config, quant_config, f"{prefix}.self_attn"
            )
        else:
            self.short_conv = Lfm2ShortConv(
                arch, *page, vllm_config, quant_config, f"{prefix}.short_conv"
            )
        if index < arch.num_dense_layers:
            self.feed_forward = Lfm2MoeMlp(arch, quant_config, f"{prefix}.feed_forward")
        else:
            self.feed_forward = Lfm2MoeExperts(
                arch, vllm_config, quant_config, f"{prefix}.feed_forward"
            )
        self.operator_norm = RMSNorm(arch.hidden_size, eps=arch.norm_eps)
        self.ffn_norm = RMSNorm(arch.hidden_size, eps=arch.norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes and returns the last sublayer's output and the residual that it isn't yet added to, (T, D) each."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.operator_norm(hidden_states)
        else:
            hidden_states, residual = self.operator_norm(hidden_states, residual)
        if self.is_attention:
            hidden_states = self.self_attn(positions, hidden_states)
        else:
            hidden_states = self.short_conv(hidden_states)
        hidden_states, residual = self.ffn_norm(hidden_states, residual)
        return self.feed_forward(hidden_states), residual


@support_torch_compile(
    # The dimension that is the number of tokens. vLLM would read it off the annotations, which are strings here.
    dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class Lfm2MoeModel(nn.Module, EagleModelMixin):
    """Embedding, decoder layers and final norm; the part that vLLM compiles."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        arch = Lfm2MoeArch.from_config(vllm_config.model_config.hf_config)
        self.embed_tokens = VocabParallelEmbedding(
            arch.vocab_size, arch.hidden_size, org_num_embeddings=arch.vocab_size
        )
        pages: dict[int, tuple[ConvStatePage, int]] = {}
        first, last = pipeline_stages(vllm_config, arch.num_layers)[get_pp_group().rank_in_group]
        for layers in pages_of_stage(arch, first, last):
            page = ConvStatePage(arch, vllm_config, f"{prefix}.layers.{layers[0]}.conv_state")
            pages |= {layer: (page, place) for place, layer in enumerate(layers)}
        self.start_layer, self.end_layer, self.layers = make_layers(
            arch.num_layers,
            lambda prefix: Lfm2MoeDecoderLayer(
                arch, pages.get(extract_layer_index(prefix)), vllm_config, prefix
            ),
            prefix=f"{prefix}.layers",
        )
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], arch.hidden_size
        )
        if get_pp_group().is_last_rank:
            self.embedding_norm = RMSNorm(arch.hidden_size, eps=arch.norm_eps)
        else:
            self.embedding_norm = PPMissingLayer()

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        """Hidden states (T, D) of the last stage, with the auxiliary ones that EAGLE3 wants; else those to hand on."""
        if get_pp_group().is_first_rank:
            hidden_states = (
                self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            )
            residual = None
        else:
            hidden_states = intermediate_tensors["hidden_states"]
            residual = intermediate_tensors["residual"]

        auxiliary = self._maybe_add_hidden_state([], self.start_layer, hidden_states, residual)
        layers = islice(self.layers, self.start_layer, self.end_layer)
        for index, layer in enumerate(layers, start=self.start_layer + 1):
            hidden_states, residual = layer(positions, hidden_states, residual)
            self._maybe_add_hidden_state(auxiliary, index, hidden_states, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        hidden_states, _ = self.embedding_norm(hidden_states, residual)
        return (hidden_states, auxiliary) if auxiliary else hidden_states


class Lfm2MoeForCausalLM(
    nn.Module,
    HasInnerState,
    IsHybrid,
    SupportsPP,
    SupportsLoRA,
    SupportsQuant,
    SupportsEagle,
    SupportsEagle3,
    MixtureOfExperts,
):
    """LFM2-MoE with its language model head, under the name of the class of vLLM that it replaces.

    Raises:
        UnsupportedConfig: the configuration is not one of LFM2-MoE.
        ValueError: a combination of options that can't be served right; says which and what to do.
        CheckpointError: a local checkpoint lacks tensors, has others, wrong shapes or broken files.
    """

    packed_modules_mapping = PACKED
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_substr=LORA_NAMES)
    adapters_are_checked = False
    embedding_modules = {  # noqa: RUF012
        "embed_tokens": "input_embeddings",
        "lm_head": "output_embeddings",
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.arch = arch = Lfm2MoeArch.from_config(vllm_config.model_config.hf_config)
        check_support(arch, vllm_config)
        self.quantisation = check_files(arch, vllm_config)
        if vllm_config.lora_config is not None:
            read_adapters_in_workers()
        self.config = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config
        self.vllm_config = vllm_config
        self.weights_loaded = False
        self.half_written = False
        with named_without_kernel(vllm_config.quant_config, self.quantisation):
            self.model = Lfm2MoeModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                arch.vocab_size,
                arch.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if arch.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(arch.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self._count_experts(vllm_config)
        self.packed = PackedWeights(self) if on_cpu() else None
        logger.info("LFM2-MoE is served by %s.%s.", type(self).__module__, type(self).__name__)

    @property
    def lora_manager(self) -> object:
        """vLLM's manager of adapters, which it hands the model when LoRA is on."""
        return self._lora_manager

    @lora_manager.setter
    def lora_manager(self, manager: object) -> None:
        if not self.adapters_are_checked:
            raise RuntimeError(
                "This runner of vLLM's reads LoRA adapters by a class of its own, so they would not be checked. Serve "
                "without LoRA, or set LFM2_PLUGIN=off for vLLM's own model."
            )
        self._lora_manager = manager

    def _count_experts(self, vllm_config: VllmConfig) -> None:
        """What vLLM's expert load balancer asks of a model; a stage may have no expert layer."""
        self._expert_layers = [
            layer.feed_forward
            for layer in self.model.layers
            if isinstance(getattr(layer, "feed_forward", None), Lfm2MoeExperts)
        ]
        redundant = vllm_config.parallel_config.eplb_config.num_redundant_experts
        self.moe_layers = [layer.experts for layer in self._expert_layers]
        self.expert_weights = []
        self.num_moe_layers = len(self.moe_layers)
        self.num_expert_groups = 1
        self.num_shared_experts = 0
        self.num_logical_experts = self.num_routed_experts = self.arch.num_experts
        self.num_redundant_experts = redundant
        self.num_physical_experts = self.arch.num_experts + redundant
        self.num_local_physical_experts = self.num_physical_experts // expert_ranks(vllm_config)

    def update_physical_experts_metadata(
        self, num_physical_experts: int, num_local_physical_experts: int
    ) -> None:
        """vLLM tells how many physical experts there are after it scaled their number."""
        if num_local_physical_experts != self.num_local_physical_experts:
            raise ValueError(
                f"The number of experts a rank holds can't change while serving: "
                f"{self.num_local_physical_experts} to {num_local_physical_experts}."
            )
        self.num_physical_experts = num_physical_experts
        self.num_redundant_experts = num_physical_experts - self.num_logical_experts
        for layer in self._expert_layers:
            layer.experts.update_expert_map()

    @classmethod
    def get_mamba_state_shape_from_config(
        cls, vllm_config: VllmConfig
    ) -> tuple[tuple[int, int], ...]:
        """The shape of one page of the cache, by which vLLM sizes attention blocks before there is a model."""
        arch = Lfm2MoeArch.from_config(vllm_config.model_config.hf_config)
        return (page_shape(arch, vllm_config),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return conv_state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        return conv_copy_funcs()

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits (T, V) of hidden states (T, D).

        Raises:
            RuntimeError: a weight update has failed halfway, and the weights are of no checkpoint.
        """
        if self.half_written:
            raise RuntimeError(
                "A weight update failed halfway, so the model has weights of two checkpoints. Load all weights of one, "
                "or start the engine anew."
            )
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint, or a part of one as in a weight update; see ``weights.py``."""
        return load_weights(self, self.vllm_config, weights)

    def process_weights_after_loading(self) -> None:
        """vLLM's hook after the first load, whichever of its loaders that was; a later load may be a partial update."""
        self.weights_loaded = True
        if self.packed is not None:
            self.packed.are_packed()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As every module's; on a CPU of plain weights, whatever vLLM has made of them, so that they can be loaded."""
        if self.packed is None:
            return super().state_dict(*args, **kwargs)
        with self.packed.all_plain():
            return super().state_dict(*args, **kwargs)
