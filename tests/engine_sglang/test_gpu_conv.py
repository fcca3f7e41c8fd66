"""The GPU path's own part, its snapshots of conv states, on a CPU against the naive operator's checkpoints.

The kernels around it are SGLang's and need a GPU.
"""

import pytest
import torch

from lfm2_plugin.conv_batch import ConvBatch
from lfm2_plugin.ops.short_conv import short_conv_naive
from sglang_model import gpu_conv

D, SLOTS = 8, 12


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_snapshots_are_the_states_on_the_way(width: int):
    """Queries shorter and longer than the state, fresh and continued, with and without a snapshot."""
    generator = torch.Generator().manual_seed(width)
    lengths, offsets = [1, 9, 20, 4, 2, 30], [0, 6, 20, 2, 2, 1]
    fresh = [True, False, True, False, False, True]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    u = torch.randn(sum(lengths), D, generator=generator)
    state = torch.randn(SLOTS, D, width - 1, generator=generator)
    slots, targets = torch.tensor([3, 5, 1, 7, 2, 9]), torch.tensor([4, 6, 8, 10, 11, 4])
    targets[0] = 5  # no snapshot is asked for: a slot that is in use, which must stay as it is

    before, expected = state.clone(), state.clone()
    batch = ConvBatch(
        slots=slots,
        query_start=starts,
        has_initial_state=~torch.tensor(fresh),
        num_decodes=0,
        num_decode_tokens=0,
        num_prefills=len(lengths),
        num_prefill_tokens=sum(lengths),
        checkpoint_offsets=torch.tensor(offsets),
        checkpoint_slots=targets,
    )
    ones = torch.ones_like(u)
    out = torch.empty_like(u)
    bcx = torch.cat([ones, ones, u], dim=1)
    short_conv_naive(bcx, torch.ones(D, width), None, expected, batch, out)

    gpu_conv._write_snapshots(
        u, state, slots, starts, ~torch.tensor(fresh), torch.tensor(offsets), targets
    )
    for index, target in enumerate(targets.tolist()):
        if offsets[index]:
            assert torch.equal(state[target], expected[target]), f"sequence {index}"
    untouched = sorted(
        {*range(1, SLOTS)} - {t for t, o in zip(targets.tolist(), offsets, strict=True) if o}
    )
    assert torch.equal(state[untouched], before[untouched])
