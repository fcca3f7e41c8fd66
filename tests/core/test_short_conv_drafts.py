"""Drafts in a tree: each is convolved, and leaves the state, as if its branch were the sequence's text."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from lfm2_plugin.conv_batch import ConvBatch
from lfm2_plugin.ops.short_conv import short_conv_naive, short_conv_native
from lfm2_plugin.ops.short_conv_drafts import (
    branches,
    chain,
    short_conv_drafts,
    short_conv_drafts_naive,
    short_conv_drafts_native,
    tree,
)
from tests.short_conv_steps import same_bits
from tests.tolerances import assert_within

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 3, 32), (2, 5, 3, 32), (3, 4, 2, 17), (4, 12, 4, 16), (2, 3, 8, 16)]  # S, q, K, D


RUNS = {"naive": short_conv_drafts_naive, "native": short_conv_drafts_native}


def make(S: int, q: int, K: int, D: int, dtype: torch.dtype, bias: bool = True) -> tuple:
    """Inputs of a step; the slots that are in use lie anywhere among others, which hold NaN."""
    generator = torch.Generator().manual_seed(S + 10 * q)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    state = torch.full((2 * S + 1, D, K - 1), float("nan"), dtype=dtype)
    slots = torch.randperm(2 * S + 1, generator=generator)[:S]
    state[slots] = randn(S, D, K - 1)
    return randn(S * q, 3 * D), randn(D, K), randn(D) if bias else None, state, slots


def empty_windows(S: int, q: int, state: torch.Tensor) -> torch.Tensor:
    """Larger than is needed, as an engine's are; what is not written stays NaN."""
    return torch.full((S + 1, q + 2, *state.shape[1:]), float("nan"), dtype=state.dtype)


def random_tree(S: int, q: int, seed: int) -> torch.Tensor:
    rng = random.Random(seed)
    return torch.tensor([[rng.randrange(t) if t else -1 for t in range(q)] for _ in range(S)])


def decodes(S: int, q: int) -> ConvBatch:
    return ConvBatch(
        slots=torch.arange(S),
        query_start=torch.arange(0, S * q + 1, q),
        has_initial_state=torch.ones(S, dtype=torch.bool),
        num_decodes=S,
        num_decode_tokens=S * q,
        num_prefills=0,
        num_prefill_tokens=0,
        max_decode_len=q,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_chain_is_a_decode_of_many_tokens(shape: tuple, dtype: torch.dtype) -> None:
    """Bit for bit the native operator, and within bounds the naive one; states as it leaves them."""
    S, q, K, D = shape
    bcx, weight, bias, state, slots = make(*shape, dtype)
    windows = empty_windows(S, q, state)
    seen = branches(chain(S, q, bcx.device), K)
    out = short_conv_drafts(bcx, weight, bias, state, slots, seen, windows)
    assert windows[S:].isnan().all()
    assert windows[:, q:].isnan().all()
    for run in (short_conv_native, short_conv_naive):
        after = torch.cat([state[slots], state.new_zeros(S, D, q - 1)], dim=-1)
        expected = torch.empty_like(out)
        run(bcx, weight, bias, after, decodes(S, q), expected)
        if run is short_conv_native:
            assert torch.equal(out, expected)
        assert_within("short_conv", out, expected)
        for step in range(q):
            assert torch.equal(windows[:S, step], after[:, :, step : step + K - 1])


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_branch_is_a_text(shape: tuple, dtype: torch.dtype, seed: int, run) -> None:
    """Draft by draft: the naive operator of plain sequences on its branch alone."""
    S, q, K, D = shape
    bcx, weight, bias, state, slots = make(*shape, dtype, bias=seed % 2 == 0)
    before, windows = state.clone(), empty_windows(S, q, state)[:S, :q]
    predecessors = random_tree(S, q, seed)
    out = torch.full((S * q, D), float("nan"), dtype=dtype)
    run(bcx, weight, bias, state, slots, branches(predecessors, K), windows, out)
    assert same_bits(state, before)
    for s in range(S):
        for draft in range(q):
            branch = [draft]
            while predecessors[s, branch[0]] >= 0:
                branch.insert(0, int(predecessors[s, branch[0]]))
            rows = bcx[[s * q + t for t in branch]]
            length = len(branch)
            text = torch.cat([state[slots[s], None], state.new_zeros(1, D, length - 1)], dim=-1)
            expected = rows.new_empty(length, D)
            short_conv_naive(rows, weight, bias, text, decodes(1, length), expected)
            assert_within("short_conv", out[s * q + draft], expected[-1])
            assert torch.equal(windows[s, draft], text[0, :, length - 1 :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bcx": torch.zeros(5, 96)}, r"need bcx \(6, 96\) and 3 places a draft"),
        ({"seen": torch.zeros(2, 3, 2, dtype=torch.int64)}, "3 places a draft"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, r"2 sequences need slots \(2,\)"),
        ({"state": torch.zeros(4, 32, 3)}, r"state \(slots, 32, 2\)"),
        ({"windows": torch.zeros(2, 2, 32, 2)}, r"windows must be \(at least 2, at least 3, 32, 2\)"),
        ({"windows": torch.zeros(2, 3, 32, 2).half()}, "of torch.float32 like state"),
        ({"weight": torch.zeros(32, 3).half()}, "must be torch.float32 like bcx"),
        ({"bias": torch.zeros(31)}, r"bias must be \(32,\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    S, q, K, D = 2, 3, 3, 32
    bcx, weight, bias, state, slots = make(S, q, K, D, torch.float32)
    given = {
        "bcx": bcx,
        "weight": weight,
        "bias": bias,
        "state": state,
        "slots": slots,
        "seen": branches(chain(S, q, bcx.device), K),
        "windows": empty_windows(S, q, state),
    }
    with pytest.raises(ValueError, match=message):
        short_conv_drafts(**(given | change))


@pytest.mark.parametrize("q", [1, 2, 7, 12])
def test_a_tree_by_its_links(q: int) -> None:
    predecessors = torch.cat([random_tree(5, q, q), chain(1, q, torch.device("cpu"))])
    child, sibling = torch.full_like(predecessors, -1), torch.full_like(predecessors, -1)
    for s, t in ((s, t) for s in range(6) for t in range(q)):
        children = (predecessors[s] == t).nonzero().squeeze(1).tolist()
        if children:
            child[s, t] = children[0]
        for one, next_one in pairwise(children):
            sibling[s, one] = next_one
    assert torch.equal(tree(child, sibling), predecessors)
