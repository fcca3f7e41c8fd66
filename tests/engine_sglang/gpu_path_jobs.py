"""What runs inside the child of the interpreting server: the convolution's default way on a GPU, of SGLang's kernels.

What comes out is compared with the naive operator's. SGLang has the kernel of prefills twice, in CUDA and in Triton,
behind one function: here it is the second, which AMD's GPUs have.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from lfm2_plugin.conv_batch import ConvBatch
from sglang_model import gpu_conv
from sglang_model.feed_forward import Lfm2MoeExperts
from tests.engine_common.gpu_path import checked
from tests.router_launches import BIAS, SCALING, A, launches_of
from tests.short_conv_steps import Case, make_step

DECODES = [
    Case("decode", decodes=[1] * 3),
    Case("decode, a captured graph with room left", decodes=[1] * 4, nulls=[1, 3]),
    Case("decode, bias", decodes=[1, 1], bias=True, width=4),
]
EXTENDS = [
    Case("extend", prefills=[5, 1, 2, 20], fresh=[0, 3]),
    Case("extend, bias", prefills=[1, 3, 70], fresh=[1], bias=True, width=4),
    Case("extend, decodes among the prefills", prefills=[1, 1, 12, 1], fresh=[2]),
    Case("extend, an idle sequence", prefills=[4, 6, 3], nulls=[1]),
    Case("snapshots", prefills=[19, 9, 1, 17], checkpoints=[16, 0, 1, 17], fresh=[0, 1]),
    Case("snapshots, early", prefills=[9, 6, 5], checkpoints=[1, 2, 4], fresh=[1], width=4),
]
UNUSED = -1  # SGLang's slot of a sequence that isn't there


def default_path() -> dict[str, str]:
    """Each case's name and "equal", or how ours and the naive operator's differ.

    In float32, and decodes in bfloat16 too: of that dtype SGLang has a kernel for the whole operator.
    """
    found = {
        case.name: checked(run, case, step_of(case, torch.float32)) for case in DECODES + EXTENDS
    }
    gpu_conv.can_dispatch_fused_lfm_short_conv = lambda *_: True  # on a GPU it asks for an H100
    for case in DECODES:
        if case.width == 3:
            found[f"{case.name}, fused"] = checked(run, case, step_of(case, torch.bfloat16))
    return found


def routing() -> list[list[str]]:
    """What our routing launches for SGLang before the kernel's trial and after it; SGLang masks padding by itself."""
    layer = SimpleNamespace(arch=SimpleNamespace(routed_scaling_factor=SCALING), expert_bias=BIAS)

    def route(logits: torch.Tensor, padding: None) -> tuple[torch.Tensor, torch.Tensor]:
        return Lfm2MoeExperts._route(layer, logits, logits, A, renormalize=True)

    return launches_of(route, with_padding=False)


def step_of(case: Case, dtype: torch.dtype) -> tuple:
    """With states as in SGLang's pool: a channel's columns side by side."""
    bcx, weight, bias, state, batch = make_step(case, dtype)
    return bcx, weight.t().contiguous().t(), bias, state.contiguous(), batch


def run(
    case: Case,
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    batch: ConvBatch,
    out: torch.Tensor,
) -> None:
    """One step; arguments and results as of the naive operator."""
    slots = batch.slots.masked_fill(batch.slots == batch.null_slot, UNUSED)
    if batch.num_decodes:
        out.copy_(gpu_conv.decode(bcx, weight, bias, state, slots))
        return
    snapshots = None
    if case.checkpoints is not None:
        snapshots = batch.checkpoint_offsets, batch.checkpoint_slots
    args = (slots, batch.query_start, batch.has_initial_state, snapshots)
    out.copy_(gpu_conv.extend(bcx, weight, bias, state, *args))
    # SGLang's kernel leaves the rows of a sequence that isn't there as it found them, whatever that memory holds.
    out[(slots == UNUSED).repeat_interleave(batch.query_start.diff())] = 0
