"""Drafts in SGLang's pool of states, chains and trees: after any of them the state is that of its branch's text.

A CPU serves chains only; the trees here are what SGLang verifies on a GPU.
"""

import random
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MambaPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from lfm2_plugin.conv_batch import ConvBatch
from lfm2_plugin.ops.short_conv import short_conv
from sglang_model.conv_state import ConvStateBackend
from sglang_model.engine_api import conv_cache_params
from tests.tolerances import assert_within

LAYERS = (1, 2, 5)
SLOTS = 9


class Backend(ConvStateBackend):
    """The backend as it is before the first layer of a step, on a pool of SGLang's."""

    def __init__(self, pool: MambaPool, slots: list[int], links=(None, None)) -> None:
        by_layer = {layer: index for index, layer in enumerate(LAYERS)}
        self.req_to_token_pool = SimpleNamespace(
            mamba2_layer_cache=lambda layer: pool.mamba2_layer_cache(by_layer[layer]),
            get_speculative_mamba2_params_all_layers=pool.get_speculative_mamba2_params_all_layers,
        )
        self._cache_indices = torch.tensor(slots)
        self.forward_metadata = SimpleNamespace(
            retrieve_next_token=links[0], retrieve_next_sibling=links[1]
        )
        self._seen = None
        self._first_layer, self._last_layer = LAYERS[0], LAYERS[-1]


def make_pool(width: int, channels: int, drafts: int, branches: int) -> MambaPool:
    params = conv_cache_params(channels, width, LAYERS, torch.float32)
    pool = MambaPool(
        size=SLOTS,
        spec_state_size=4,
        cache_params=params,
        mamba_layer_ids=list(LAYERS),
        device="cpu",
        speculative_num_draft_tokens=drafts,
        speculative_eagle_topk=branches,
    )
    state = pool.mamba_cache.conv[0]
    state.copy_(torch.randn(state.shape, generator=torch.Generator().manual_seed(1)))
    return pool


def make_links(predecessors: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A tree as SGLang gives it: each draft's first child and next sibling, -1 for none."""
    child, sibling = (torch.full((len(predecessors), len(predecessors[0])), -1) for _ in range(2))
    for s, before in enumerate(predecessors):
        for t in reversed(range(1, len(before))):
            sibling[s, t] = child[s, before[t]]
            child[s, before[t]] = t
    return child, sibling


def branch_of(before: list[int], draft: int) -> list[int]:
    branch = [draft]
    while before[branch[0]] >= 0:
        branch.insert(0, before[branch[0]])
    return branch


@pytest.mark.parametrize("drafts", [1, 2, 5, 8])
@pytest.mark.parametrize("width", [3, 4])
@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_states_are_those_of_the_branches(kind, width, drafts):
    """Any number of drafts stands in the end, with a snapshot after some of them; the other slots don't change."""
    channels, slots = 16, [3, 7, 4]
    rng = random.Random(drafts)
    if kind == "tree":
        trees = [[-1, *[rng.randrange(t) for t in range(1, drafts)]] for _ in slots]
    else:
        trees = [list(range(-1, drafts - 1)) for _ in slots]
    pool = make_pool(width, channels, drafts, 3 if kind == "tree" else 1)
    before = pool.mamba_cache.conv[0].clone()
    generator = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    links = make_links(trees) if kind == "tree" else (None, None)
    backend = Backend(pool, slots, links)
    step = SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY,
        spec_info=SimpleNamespace(ragged_verify_layout=None),
    )
    weights = {layer: (randn(channels, width), randn(channels)) for layer in LAYERS}
    inputs = {layer: randn(len(slots) * drafts, 3 * channels) for layer in LAYERS}
    outputs = {
        layer: backend.convolve(layer, inputs[layer], *weights[layer], step) for layer in LAYERS
    }
    assert torch.equal(pool.mamba_cache.conv[0], before)

    last = torch.tensor([rng.randrange(drafts) for _ in slots])
    snapshots = torch.tensor([rng.choice(branch_of(trees[i], int(t))) for i, t in enumerate(last)])
    snapshots[1] = -1
    backend.keep_drafts(last, torch.tensor([1, 2, 8]), snapshots)
    after = pool.mamba_cache.conv[0]
    for index, layer in enumerate(LAYERS):
        for s, slot in enumerate(slots):
            for draft in range(drafts):
                branch = branch_of(trees[s], draft)
                state = before[index, slot].clone()[None]
                rows = inputs[layer][[s * drafts + t for t in branch]]
                batch = ConvBatch(
                    slots=torch.tensor([0]),
                    query_start=torch.tensor([0, len(branch)]),
                    has_initial_state=torch.tensor([True]),
                    num_decodes=0,
                    num_decode_tokens=0,
                    num_prefills=1,
                    num_prefill_tokens=len(branch),
                )
                expected = short_conv(rows, *weights[layer], state, batch)
                assert_within("short_conv", outputs[layer][s * drafts + draft], expected[-1])
                if draft == last[s]:
                    assert torch.equal(after[index, slot], state[0])
                if draft == snapshots[s]:
                    assert torch.equal(after[index, [1, 2, 8][s]], state[0])
    untouched = [0, 2, 5, 6, 9]
    assert torch.equal(after[:, untouched], before[:, untouched])


def test_ragged_drafts_are_refused():
    backend = Backend(make_pool(3, 16, 4, 1), [1])
    layout = SimpleNamespace(ragged_verify_layout=object())
    step = SimpleNamespace(forward_mode=ForwardMode.TARGET_VERIFY, spec_info=layout)
    with pytest.raises(ValueError, match="SGLANG_RAGGED_VERIFY_MODE=compact; set it to static"):
        backend.convolve(1, torch.zeros(4, 48), torch.zeros(16, 3), None, step)
