"""The router as one launch on a GPU, from logits to weights and expert ids.

The steps and their roundings are those of the reference: scores in the logits' dtype, the ranking in float32 where
there is a bias, and each step of the renormalisation rounded to the logits' dtype again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lfm2_plugin.ops.router.naive import EPSILON

TOKENS = 8
"""Tokens of a program: with 64 experts 4 values for each of 128 threads."""


@triton.jit(do_not_specialize=["T"])  # else compiled anew for 1 token, and for 16
def _route(
    logits_ptr,
    bias_ptr,
    padding_ptr,
    weights_ptr,
    ids_ptr,
    T,
    logits_stride,
    scaling,
    epsilon,
    HAS_BIAS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    RENORMALISE: tl.constexpr,
    E: tl.constexpr,
    A: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    dtype = logits_ptr.dtype.element_ty
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    experts = tl.arange(0, EXPERTS)
    live = tokens < T
    rows = logits_ptr + tokens.to(tl.int64)[:, None] * logits_stride
    known = live[:, None] & (experts < E)[None, :]
    logits = tl.load(rows + experts[None, :], mask=known, other=0.0).to(tl.float32)
    scores = (1.0 / (1.0 + tl.exp(-logits))).to(dtype).to(tl.float32)
    ranking = scores
    if HAS_BIAS:
        ranking += tl.load(bias_ptr + experts, mask=experts < E, other=0.0)[None, :]
    # As in torch, NaN ranks first: a broken token must still name experts that exist.
    ranking = tl.where(ranking == ranking, ranking, float("inf"))
    ranking = tl.where((experts < E)[None, :], ranking, float("-inf"))

    chosen = ()
    total = tl.zeros([TOKENS], tl.float32)
    for _ in tl.static_range(A):
        best = tl.max(ranking, axis=1)
        first = tl.where(ranking == best[:, None], experts[None, :], EXPERTS)
        expert = tl.min(first, axis=1)
        taken = experts[None, :] == expert[:, None]
        score = tl.sum(tl.where(taken, scores, 0.0), axis=1)
        ranking = tl.where(taken, float("-inf"), ranking)
        total += score
        chosen = chosen + ((expert, score),)

    divisor = (total.to(dtype).to(tl.float32) + epsilon).to(dtype).to(tl.float32)
    counts = live
    if HAS_PADDING:
        counts = live & (tl.load(padding_ptr + tokens, mask=live, other=1) == 0)
    for a in tl.static_range(A):
        expert, score = chosen[a]
        if RENORMALISE:
            score = (score / divisor).to(dtype).to(tl.float32)
        weight = (score * scaling).to(dtype).to(tl.float32)
        place = tokens.to(tl.int64) * A + a
        tl.store(weights_ptr + place, tl.where(counts, weight, 0.0), mask=live)
        identity = tl.where(counts, expert, -1)
        tl.store(ids_ptr + place, identity.to(ids_ptr.dtype.element_ty), mask=live)


def route_triton(
    logits: torch.Tensor,
    expert_bias: torch.Tensor | None,
    top_k: int,
    renormalise: bool,
    scaling: float,
    padding: torch.Tensor | None,
    ids_dtype: torch.dtype = torch.int32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`lfm2_plugin.ops.router.route`; ``ids_dtype`` is what the kernel of the experts wants."""
    T, E = logits.shape
    weights = torch.empty(T, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(T, top_k, dtype=ids_dtype, device=logits.device)
    if not T:
        return weights, ids
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    _route[(triton.cdiv(T, TOKENS),)](
        logits,
        logits if expert_bias is None else expert_bias,
        logits if padding is None else padding,
        weights,
        ids,
        T,
        logits.stride(0),
        float(scaling),
        EPSILON,
        HAS_BIAS=expert_bias is not None,
        HAS_PADDING=padding is not None,
        RENORMALISE=renormalise,
        E=E,
        A=top_k,
        EXPERTS=triton.next_power_of_2(E),
        TOKENS=TOKENS,
    )
    return weights, ids
