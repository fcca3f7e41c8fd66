"""What runs inside the child of the interpreting server: a layer's default way on a GPU, by vLLM's own kernels.

The convolution is ours with its real ``forward_cuda``, its state one of three in a page, in vLLM's forward context; the
step is vLLM's metadata. What comes out is compared with the naive operator's.
"""

from __future__ import annotations

import importlib
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
from vllm.platforms import current_platform

from benchmarks.gpu import short_conv_builtins
from lfm2_plugin.conv_batch import ConvBatch
from lfm2_plugin.depthwise_kernel import DepthwiseKernel
from tests.engine_common.builtin_kernels import with_handles
from tests.engine_common.gpu_path import checked
from tests.router_launches import BIAS, SCALING, A, E, launches_of
from tests.short_conv_steps import NULL, Case, make_step
from vllm_model import short_conv
from vllm_model.conv_state import ConvStatePage, ConvStepMetadata
from vllm_model.feed_forward import Lfm2MoeExperts

PAGE, LAYER = "model.layers.2.conv_state", "model.layers.3.short_conv"
STATES, MINE = 3, 1  # a page has room for three layers' states, and the layer's is the second
CASES = [
    Case("decode", decodes=[1] * 3),
    Case("decode, a captured graph with room left", decodes=[1] * 4, nulls=[2, 3], padding=2),
    Case("decode, bias", decodes=[1, 1], bias=True, width=4),
    Case("prefill", prefills=[5, 1, 2, 20], fresh=[0, 3]),
    Case("prefill, padding", prefills=[2, 9], fresh=[0], padding=3, bias=True),
    Case("mixed", decodes=[1, 1], prefills=[12, 1], fresh=[2]),
    Case("mixed, padding", decodes=[1], prefills=[3], padding=5, width=4),
    Case("checkpoints", prefills=[19, 9, 4, 17], checkpoints=[16, 0, 2, 16], fresh=[0, 1]),
    Case("checkpoints beside decodes", [1, 1], [18, 3], fresh=[3], checkpoints=[8, 0], padding=2),
    Case("0 to 3 drafts accepted", decodes=[4] * 4, accepted=[1, 2, 3, 4], drafts=3),
    Case("drafts, fewer than there may be", decodes=[4, 1, 3], accepted=[2, 1, 4], drafts=3),
    Case("drafts, a captured graph with room left", [4, 4, 0], nulls=[2], accepted=[1, 3, 1], drafts=3, padding=4),
    Case("drafts beside prefills", [3, 2], [9, 1], accepted=[3, 2], fresh=[3], drafts=2, padding=3),
    Case("no drafts in a step that may have them", decodes=[1, 1], accepted=[1, 3], drafts=2),
    Case("prefills, where decodes have drafts", prefills=[5, 1], fresh=[0], drafts=3),
]  # fmt: skip


def default_path() -> dict[str, str]:
    """Each case's name and "equal", or how ours and the naive operator's differ."""
    use_gpu_kernels()
    return {case.name: checked(run, case, step_of(case)) for case in CASES}


def step_of(case: Case) -> tuple:
    """As vLLM tells it: where a prefill has no checkpoint, its slot is the null block."""
    *tensors, batch = make_step(case, torch.float32)
    if batch.checkpoint_offsets is not None:
        batch.checkpoint_slots[batch.checkpoint_offsets == 0] = NULL
    return *tensors, batch


def missing_page() -> dict[str, str]:
    """What a step says, by operator, whose metadata has other layers' pages and not this layer's."""
    bcx, weight, *_ = make_step(CASES[0], torch.float32)
    layer = make_layer(weight, None, 0)
    said = {}
    for name in ("forward_native", "forward_cuda"):
        with set_forward_context({"another.page": None}, VllmConfig()):
            try:
                getattr(layer, name)(bcx, torch.empty_like(bcx[:, : weight.shape[0]]))
            except RuntimeError as error:
                said[name] = str(error)
    return said


def routing() -> list[list[str]]:
    """What vLLM's router launches, our routing in it, before the kernel's trial and after it."""
    layer = SimpleNamespace(arch=SimpleNamespace(routed_scaling_factor=SCALING), expert_bias=BIAS)
    ours = MethodType(Lfm2MoeExperts._route, layer)
    router = CustomRoutingRouter(A, E, ours, renormalize=True)

    def route(logits: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with set_forward_context(None, VllmConfig(), is_padding=padding):
            return router._select_experts(logits, logits, torch.int32)

    return launches_of(route)


def use_gpu_kernels() -> None:
    """vLLM's builds for CPUs have the Triton kernels too, under names that they give to others when imported."""
    from vllm.model_executor.layers.mamba.ops import causal_conv1d

    kind = type(current_platform)
    is_cpu, kind.is_cpu = kind.is_cpu, lambda *_: False
    importlib.reload(causal_conv1d)
    kind.is_cpu = is_cpu
    for name in ("causal_conv1d_fn", "causal_conv1d_update"):
        kernel = getattr(causal_conv1d, name)
        assert kernel.__module__ == causal_conv1d.__name__
        setattr(short_conv, name, kernel)


def run(
    case: Case,
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    batch: ConvBatch,
    out: torch.Tensor,
) -> None:
    """One step of the layer; arguments and results as of the naive operator."""
    layer = make_layer(weight, bias, case.drafts)
    page, cache = make_page(state)
    config = VllmConfig()
    config.compilation_config.static_forward_context |= {PAGE: page, LAYER: layer}
    with set_forward_context({PAGE: metadata_of(batch, case.drafts)}, config):
        layer.forward_cuda(hidden_states=bcx, output=out)
    columns, channels = cache.shape[1], weight.shape[0]
    beside = cache.view(-1, columns, STATES, channels).index_select(2, torch.tensor([0, 2]))
    assert beside.isnan().all(), "another layer's state in the page was written"
    state.copy_(page.state(MINE))


def make_layer(
    weight: torch.Tensor, bias: torch.Tensor | None, drafts: int
) -> short_conv.Lfm2ShortConv:
    """The layer without its projections, which need an engine."""
    layer = short_conv.Lfm2ShortConv.__new__(short_conv.Lfm2ShortConv)
    nn.Module.__init__(layer)
    layer.prefix, layer.page_name, layer.page_index = LAYER, PAGE, MINE
    layer.dim, layer.max_query_len = weight.shape[0], 1 + drafts
    layer.conv = DepthwiseKernel(*weight.shape, bias is not None, rank=0).to(weight.dtype)
    layer.conv.weight.data.copy_(weight.t())
    if bias is not None:
        layer.conv.bias.data.copy_(bias)
    return layer


def make_page(state: torch.Tensor) -> tuple[ConvStatePage, torch.Tensor]:
    """A page with ``state`` (slots, D, L) as one of its states, all others NaN; the page and its memory."""
    slots, channels, columns = state.shape
    cache = state.new_full((slots, columns, STATES * channels), float("nan"))
    page = ConvStatePage.__new__(ConvStatePage)
    page.name, page.channels, page.kv_cache = PAGE, channels, (cache,)
    page.state(MINE).copy_(state)
    return page, cache


def metadata_of(batch: ConvBatch, drafts: int) -> ConvStepMetadata:
    """The step as vLLM's builder tells it; the columns of its table that a conv state has no use for are NaN's like."""
    d = batch.num_decodes
    table = torch.full((d, 1 + drafts), 2**30, dtype=torch.int32)
    table[:, 0] = batch.slots[:d]
    speculates = batch.num_accepted is not None
    fields: dict[str, Any] = dict.fromkeys(
        ("query_start_loc_p", "has_initial_states_p", "nums_dict", "batch_ptr", "token_chunk_offset_ptr")
    )  # fmt: skip
    if batch.num_prefills:
        starts = batch.query_start[d:] - batch.query_start[d]
        programs = with_handles(short_conv_builtins.vllm_programs)(starts)
        fields |= vars(programs)
        fields |= {"query_start_loc_p": starts, "has_initial_states_p": batch.has_initial_state[d:]}
    return ConvStepMetadata(
        num_prefills=batch.num_prefills,
        num_prefill_tokens=batch.num_prefill_tokens,
        num_decodes=d,
        num_decode_tokens=batch.num_decode_tokens,
        num_reqs=batch.num_sequences,
        state_indices_tensor_d=table,
        state_indices_tensor_p=batch.slots[d:],
        query_start_loc_d=batch.query_start[: d + 1] if speculates and d else None,
        num_accepted_tokens=batch.num_accepted,
        seq_lens=torch.zeros(1, dtype=torch.int32),
        batch=batch,
        **fields,
    )
