"""Drafts in a tree: each is convolved, and leaves the state, as if its branch were the sequence's text."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from tolerances import assert_within

from lfm2_plugin.conv_batch import ConvBatch
from lfm2_plugin.ops.short_conv import (
    branches,
    chain,
    short_conv_drafts,
    short_conv_naive,
    short_conv_native,
    tree,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 3, 32), (2, 5, 3, 32), (3, 4, 2, 17), (4, 12, 4, 16), (2, 3, 8, 16)]  # S, q, K, D


def make(S: int, q: int, K: int, D: int, dtype: torch.dtype, bias: bool = True) -> tuple:
    generator = torch.Generator().manual_seed(S + 10 * q)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return randn(S * q, 3 * D), randn(D, K), randn(D) if bias else None, randn(S, D, K - 1)


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
    bcx, weight, bias, history = make(*shape, dtype)
    out, states = short_conv_drafts(
        bcx, weight, bias, history, branches(chain(S, q, bcx.device), K)
    )
    for run in (short_conv_native, short_conv_naive):
        state = torch.cat([history, history.new_zeros(S, D, q - 1)], dim=-1)
        expected = torch.empty_like(out)
        run(bcx, weight, bias, state, decodes(S, q), expected)
        if run is short_conv_native:
            assert torch.equal(out, expected)
        assert_within("short_conv", out, expected)
        for step in range(q):
            assert torch.equal(states[:, step], state[:, :, step : step + K - 1])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_branch_is_a_text(shape: tuple, dtype: torch.dtype, seed: int) -> None:
    """Draft by draft: the naive operator on its branch alone."""
    S, q, K, D = shape
    bcx, weight, bias, history = make(*shape, dtype, bias=seed % 2 == 0)
    before = history.clone()
    predecessors = random_tree(S, q, seed)
    out, states = short_conv_drafts(bcx, weight, bias, history, branches(predecessors, K))
    assert torch.equal(history, before)
    for s in range(S):
        for draft in range(q):
            branch = [draft]
            while predecessors[s, branch[0]] >= 0:
                branch.insert(0, int(predecessors[s, branch[0]]))
            rows = bcx[[s * q + t for t in branch]]
            length = len(branch)
            state = torch.cat([history[s : s + 1], history.new_zeros(1, D, length - 1)], dim=-1)
            expected = rows.new_empty(length, D)
            short_conv_naive(rows, weight, bias, state, decodes(1, length), expected)
            assert_within("short_conv", out[s * q + draft], expected[-1])
            assert torch.equal(states[s, draft], state[0, :, length - 1 :])


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
