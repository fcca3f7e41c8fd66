"""The pages of vLLM's cache that hold the states of the short convolutions.

vLLM gives every layer with a state a page per block, as large as an attention page, and puts layers in groups as many
as there are attention layers. LFM2-MoE has three convolutions to one attention layer and a convolution's state is a
quarter of an attention page or less, so a page for each would be mostly padding, three groups of it. Here several
convolutions share a page: seen by the engine a page is one convolution with that many times the channels, which the
engine's copies (prefix cache, speculation, transfer) handle as it is, and a model has as many pages as attention
layers, hence one group. ``docs/decisions/0002-packed-conv-pages.md`` has the reasons, ``docs/memory.md`` the figures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.conv_batch import ConvBatch
from lfm2_plugin.dispatch import is_forced

from .engine_api import (
    CommonAttentionMetadata,
    MambaAttentionBackendEnum,
    MambaBase,
    MambaPrefillCheckpointBuilder,
    MambaSpec,
    ShortConvAttentionBackend,
    ShortConvAttentionMetadata,
    ShortConvAttentionMetadataBuilder,
    VllmConfig,
    conv_state_dtypes,
    conv_state_shape,
    is_conv_state_dim_first,
    on_cpu,
    pipeline_stages,
)
from .engine_metadata import conv_batch_from


def our_operator_runs() -> bool:
    """Whether steps go through our operator: on a CPU, and on a GPU where the user names an implementation of it."""
    return on_cpu() or is_forced()


def pages_of_stage(arch: Lfm2MoeArch, first: int, last: int) -> list[list[int]]:
    """The conv layers of the pipeline stage [first, last), cut into pages; each page lists its layers' indices.

    As many pages as the stage has attention layers, filled evenly.
    """
    layers = [i for i in arch.conv_layers if first <= i < last]
    attentions = sum(first <= i < last for i in arch.attention_layers)
    pages = min(len(layers), max(attentions, 1))
    return [layers[len(layers) * p // pages : len(layers) * (p + 1) // pages] for p in range(pages)]


def states_per_page(arch: Lfm2MoeArch, vllm_config: VllmConfig) -> int:
    """How many states a page has room for: the most that any page of any stage holds, since all must be alike."""
    stages = pipeline_stages(vllm_config, arch.num_layers)
    return max(
        (len(page) for first, last in stages for page in pages_of_stage(arch, first, last)),
        default=1,
    )


def page_shape(arch: Lfm2MoeArch, vllm_config: VllmConfig) -> tuple[int, int]:
    """One slot of a page: (K-1+drafts, states_per_page * D) or, in vLLM's other layout, the transpose; D per rank."""
    channels = states_per_page(arch, vllm_config) * arch.hidden_size
    return conv_state_shape(vllm_config, channels, arch.conv_width)


@dataclass
class ConvStepMetadata(ShortConvAttentionMetadata):
    """vLLM's metadata of a step, and the same as a :class:`ConvBatch` where our operator runs."""

    batch: ConvBatch | None = None


class ConvStepMetadataBuilder(ShortConvAttentionMetadataBuilder):
    """Builds a step's metadata once for all pages, with the checkpoints that one-step prefills leave behind."""

    metadata_cls = ConvStepMetadata
    # Other block tables would leave the ConvBatch as it is. All pages are of one group, so nothing is built twice.
    supports_update_block_table = False

    def __init__(
        self,
        kv_cache_spec: MambaSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Program ids for the engine's GPU kernel, made on the host for each step with a prefill.
        self.needs_causal_conv1d_metadata = not our_operator_runs()
        self._checkpoints = MambaPrefillCheckpointBuilder(vllm_config, kv_cache_spec)
        self._align = vllm_config.cache_config.mamba_cache_mode == "align"
        self._always = torch.ones(
            vllm_config.scheduler_config.max_num_seqs, dtype=torch.bool, device=device
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> ConvStepMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
        checkpoint = None
        if metadata.num_prefills and self._align:
            first = metadata.num_reqs - metadata.num_prefills
            rows = list(range(first, metadata.num_reqs))
            checkpoint = self._checkpoints.build(common_attn_metadata, rows)
        return replace(
            metadata,
            batch=conv_batch_from(
                metadata,
                common_attn_metadata,
                checkpoint,
                self._always,
                max_decode_len=1 + self.num_spec_tokens,
            ),
        )


class ConvStateBackend(ShortConvAttentionBackend):
    """What vLLM asks a layer with a state for: here, which builder makes its metadata."""

    @staticmethod
    def get_name() -> str:
        return "LFM2_CONV_STATE"

    @staticmethod
    def get_builder_cls() -> type[ConvStepMetadataBuilder]:
        return ConvStepMetadataBuilder

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """vLLM's mode in which a request's numbers don't depend on who else is served. Our operator takes each token's
        sum in one order, whatever the step; of the engine's kernels nobody has said so.
        """
        return our_operator_runs()


class ConvStatePage(MambaBase):
    """The states of a few conv layers, known to vLLM as one layer of its cache.

    Args:
        arch: the model.
        vllm_config: the engine's configuration; the page registers itself there as ``name``.
        name: a layer name with one number in it, as vLLM requires.
    """

    def __init__(self, arch: Lfm2MoeArch, vllm_config: VllmConfig, name: str) -> None:
        self.name = name
        self._shape = page_shape(arch, vllm_config)
        self._dtypes = conv_state_dtypes(vllm_config)
        self.channels = arch.hidden_size // vllm_config.parallel_config.tensor_parallel_size
        self.kv_cache = (torch.tensor([]),)
        layers = vllm_config.compilation_config.static_forward_context
        if name in layers:
            raise ValueError(
                f"vLLM has a layer named {name} already; build the model once per engine."
            )
        layers[name] = self

    def state(self, index: int) -> torch.Tensor:
        """The state of the page's ``index``-th layer, (slots, D, K-1+drafts), a view."""
        cache = self.kv_cache[0]
        if not is_conv_state_dim_first():
            cache = cache.transpose(-1, -2)
        return cache.narrow(1, index * self.channels, self.channels)

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return (self._shape,)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self._dtypes

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.SHORT_CONV

    def get_attn_backend(self) -> type[ConvStateBackend]:
        return ConvStateBackend

    def get_prefill_checkpoint_alignment(self) -> int:
        """Any token can be a checkpoint. vLLM asks from 0.33 on; earlier ones read it from the specification."""
        return 1

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MambaSpec:
        """vLLM's specification of the page, with two changes.

        A prefill leaves a copy of its state at a block's end on its way (a checkpoint), so the scheduler need not cut a
        prompt there. And drafts take no blocks of their own: a state with drafts is a few values longer, and the
        accepted ones are found in it by their offset.
        """
        spec = super().get_kv_cache_spec(vllm_config)
        align = vllm_config.cache_config.mamba_cache_mode == "align"
        return replace(
            spec,
            num_speculative_blocks=0,
            num_prefill_checkpoint_blocks=int(align),
            prefill_checkpoint_alignment=self.get_prefill_checkpoint_alignment() if align else None,
        )
