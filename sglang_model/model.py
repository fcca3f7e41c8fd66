"""LFM2-MoE in SGLang: the model of ``lfm2_plugin/reference.py``, layer for layer, made of SGLang's layers.

The class keeps the name of SGLang's own, which it replaces: everything that SGLang keys by architecture stays in force.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lfm2_plugin.arch import Lfm2MoeArch

from .attention import Lfm2MoeAttention
from .config import Lfm2MoeConfig, arch_of
from .cpu_weights import PackedWeights
from .engine_api import (
    ForwardBatch,
    LogitsProcessor,
    ParallelLMHead,
    PPMissingLayer,
    PPProxyTensors,
    QuantizationConfig,
    RMSNorm,
    VocabParallelEmbedding,
    add_prefix,
    get_lora,
    get_parallel,
    make_layers,
    prefill_graphs_are_wanted,
)
from .feed_forward import Lfm2MoeExperts, Lfm2MoeMlp
from .lora import dimensions, serve_adapters, slices
from .registration import check_registration
from .short_conv import Lfm2ShortConv
from .support import check_support
from .weights import check_files, load_weights

logger = logging.getLogger("sglang.lfm2_plugin")


class Lfm2MoeDecoderLayer(nn.Module):
    """norm -> attention or short convolution -> norm -> dense MLP or experts, each added to the residual."""

    def __init__(
        self,
        arch: Lfm2MoeArch,
        layer_id: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.is_attention = layer_id in arch.attention_layers
        if self.is_attention:
            self.self_attn = Lfm2MoeAttention(
                arch, layer_id, quant_config, add_prefix("self_attn", prefix)
            )
        else:
            self.conv = Lfm2ShortConv(arch, layer_id, quant_config, add_prefix("conv", prefix))
        place = add_prefix("feed_forward", prefix)
        if layer_id < arch.num_dense_layers:
            self.feed_forward = Lfm2MoeMlp(arch, quant_config, place)
        else:
            self.feed_forward = Lfm2MoeExperts(arch, layer_id, quant_config, place)
        self.operator_norm = RMSNorm(arch.hidden_size, eps=arch.norm_eps)
        self.ffn_norm = RMSNorm(arch.hidden_size, eps=arch.norm_eps)

    @property
    def linear_attn(self) -> Lfm2ShortConv:
        """The name by which SGLang's prefill graphs find what runs in a gap of theirs beside attention.

        Raises:
            AttributeError: the layer is attention, or those graphs are not wanted.
        """
        if self.is_attention or not self.conv.gap_in_prefill_graphs:
            raise AttributeError("linear_attn")
        return self.conv

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        forward_batch: ForwardBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes and returns the last sublayer's output and the residual that it isn't yet added to, (T, D) each."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.operator_norm(hidden_states)
        else:
            hidden_states, residual = self.operator_norm(hidden_states, residual)
        if self.is_attention:
            hidden_states = self.self_attn(positions, hidden_states, forward_batch)
        else:
            hidden_states = self.conv(hidden_states, forward_batch)
        hidden_states, residual = self.ffn_norm(hidden_states, residual)
        return self.feed_forward(hidden_states), residual


class Lfm2MoeModel(nn.Module):
    """Embedding, the decoder layers of this pipeline stage, and the final norm."""

    def __init__(
        self, arch: Lfm2MoeArch, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        stage = get_parallel().pp_group
        self.first_stage, self.last_stage = stage.is_first_rank, stage.is_last_rank
        self.embed_tokens = PPMissingLayer()
        if self.first_stage or (self.last_stage and arch.tie_word_embeddings):
            # On the last stage it is the head's; see Lfm2MoeForCausalLM.
            self.embed_tokens = VocabParallelEmbedding(
                arch.vocab_size,
                arch.hidden_size,
                org_num_embeddings=arch.vocab_size,
                prefix=add_prefix("embed_tokens", prefix),
            )
        self.layers, self.start_layer, self.end_layer = make_layers(
            arch.num_layers,
            lambda idx, prefix: Lfm2MoeDecoderLayer(arch, idx, quant_config, prefix),
            pp_rank=stage.rank_in_group,
            pp_size=stage.world_size,
            prefix=add_prefix("layers", prefix),
        )
        self.embedding_norm = (
            RMSNorm(arch.hidden_size, eps=arch.norm_eps) if self.last_stage else PPMissingLayer()
        )
        self.captured_layers: frozenset[int] = frozenset()
        # SGLang's word for: gaps are marked in all layers, those without attention too.
        self.supports_hybrid_prefill_graph = prefill_graphs_are_wanted()

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ) -> torch.Tensor | PPProxyTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        """Hidden states (T, D) of the last stage, with those that a drafter reads; else what the next stage takes."""
        if self.first_stage:
            if input_embeds is None:
                hidden_states = self.embed_tokens(input_ids)
            else:
                # SGLang hands them on in bfloat16 whatever the model's dtype.
                hidden_states = input_embeds.to(self.embed_tokens.weight.dtype)
            residual = None
        else:
            hidden_states = pp_proxy_tensors["hidden_states"]
            residual = pp_proxy_tensors["residual"]
        captured = []
        for index in range(self.start_layer, self.end_layer):
            if index in self.captured_layers:
                captured.append(hidden_states if residual is None else hidden_states + residual)
            hidden_states, residual = self.layers[index](
                positions, hidden_states, residual, forward_batch
            )
        if not self.last_stage:
            return PPProxyTensors({"hidden_states": hidden_states, "residual": residual})
        if self.end_layer in self.captured_layers:
            captured.append(hidden_states + residual)
        hidden_states, _ = self.embedding_norm(hidden_states, residual)
        return (hidden_states, captured) if captured else hidden_states


class Lfm2MoeForCausalLM(nn.Module):
    """LFM2-MoE with its language model head, under the name of the class of SGLang that it replaces.

    Raises:
        UnsupportedConfig: the configuration is not one of LFM2-MoE.
        ValueError: a combination of options that can't be served right; says which and what to do.
        CheckpointError: a local checkpoint lacks tensors, has others, wrong shapes or broken files.
    """

    packed_modules_mapping = {  # noqa: RUF012  (SGLang reads it from the class)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "w13": ["w1", "w3"],
        # By these names SGLang looks up how the experts are quantised.
        "gate_proj": ["w1"],
        "up_proj": ["w3"],
        "down_proj": ["w2"],
    }

    def __init__(
        self,
        config: Lfm2MoeConfig,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        arch = arch_of(config)
        check_support(arch, quant_config)
        check_registration(config)
        arch, self.quantisation = check_files(arch, config)
        self.arch = arch
        config.use_state_dtype(torch.get_default_dtype())
        self.config = config
        self.quant_config = quant_config
        self.weights_loaded = False
        self.packed: PackedWeights | None = None
        self.model = Lfm2MoeModel(arch, quant_config, add_prefix("model", prefix))
        if not self.model.last_stage:
            self.lm_head = PPMissingLayer()
        elif arch.tie_word_embeddings:
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = ParallelLMHead(
                arch.vocab_size,
                arch.hidden_size,
                org_num_embeddings=arch.vocab_size,
                quant_config=quant_config,
                prefix=add_prefix("lm_head", prefix),
            )
        self.logits_processor = LogitsProcessor(config)
        if get_lora().enable_lora:
            serve_adapters()
        logger.info("LFM2-MoE is served by %s.%s.", type(self).__module__, type(self).__name__)

    @property
    def start_layer(self) -> int:
        return self.model.start_layer

    @property
    def end_layer(self) -> int:
        return self.model.end_layer

    def get_num_kv_cache_layers(self) -> int:
        """The layers of this model that keep keys and values."""
        return len(self.arch.attention_layers)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ):
        """Logits of the positions that are sampled (last stage), or what the next stage takes."""
        hidden_states = self.model(
            input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors
        )
        if not self.model.last_stage:
            return hidden_states
        captured = None
        if isinstance(hidden_states, tuple):
            hidden_states, captured = hidden_states
        return self.logits_processor(
            input_ids, hidden_states, self.lm_head, forward_batch, captured
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint, or a part of one as in a weight update; see ``weights.py``."""
        return load_weights(self, weights)

    def post_load_weights(self) -> None:
        """SGLang's hook for its loaders that fill the parameters themselves; a later load may be a partial update."""
        self.weights_loaded = True

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As every module's; on a CPU of plain weights, although we serve packed ones, so that they can be loaded."""
        if self.packed is None:
            return super().state_dict(*args, **kwargs)
        with self.packed.all_plain():
            return super().state_dict(*args, **kwargs)

    def serve_packed(self) -> None:
        """Keep weights in the form that a CPU reads fastest; our CPU platform calls this after the first load."""
        self.packed = PackedWeights(self)
        self.packed.pack()

    def get_hidden_dim(self, module_name: str, layer_idx: int) -> tuple[int, int]:
        """Inputs and outputs of a module that adapters can be on; zeros where this stage has none in the layer."""
        here = self.start_layer <= layer_idx < self.end_layer
        return dimensions(self.arch, module_name, layer_idx) if here else (0, 0)

    def get_stacked_multiply(self, module_name: str) -> int:
        """Of how many matrices, each with a factor A of its own, the module consists."""
        return slices(module_name)

    @property
    def capture_aux_hidden_states(self) -> bool:
        """Whether a drafter reads hidden states of some layers."""
        return bool(self.model.captured_layers)

    def set_eagle3_layers_to_capture(self, layer_ids: list[int] | None = None) -> None:
        """Hand on the outputs of these layers; by default of three over the depth, as EAGLE3's drafters expect."""
        if layer_ids is None:
            layers = self.arch.num_layers
            inputs = [2, layers // 2, layers - 3]
        else:
            inputs = [layer + 1 for layer in layer_ids]
        self._capture(inputs)

    def set_dflash_layers_to_capture(self, layer_ids: list[int]) -> None:
        """Hand on the outputs of these layers to a DFLASH or DSPARK drafter.

        Raises:
            ValueError: no layers are named.
        """
        if not layer_ids:
            raise ValueError("A DFLASH drafter's config must name the layers that it reads.")
        self._capture([layer + 1 for layer in layer_ids])

    def _capture(self, inputs: list[int]) -> None:
        beyond = [layer for layer in inputs if not 0 <= layer <= self.arch.num_layers]
        if beyond:
            raise ValueError(
                f"The drafter reads before layers {beyond} of a model of {self.arch.num_layers} layers; it was made "
                "for another model."
            )
        self.model.captured_layers = frozenset(inputs)

    def get_embed_and_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedding and head weights (V, D), which a drafter shares."""
        return self.model.embed_tokens.weight, self.lm_head.weight

    def set_embed_and_head(self, embed: torch.Tensor, head: torch.Tensor) -> None:
        """Share another model's embedding and head, as a drafter."""
        self.model.embed_tokens.weight = embed
        self.lm_head.weight = head


EntryClass = Lfm2MoeForCausalLM
