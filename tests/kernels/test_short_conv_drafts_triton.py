"""The Triton kernel for drafts against its naive twin, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import random

import pytest
import torch

from lfm2_plugin.ops.short_conv_drafts import branches, chain, short_conv_drafts_naive, triton
from lfm2_plugin.ops.short_conv_drafts.triton import CHANNELS, short_conv_drafts_triton
from tests.kernels.gpu_code import compiled
from tests.kernels.interpreter import Watch, in_order
from tests.short_conv_steps import DTYPES, same_bits
from tests.tiers import matrix
from tests.tolerances import assert_within

# S, q, K, D
SHAPES = [
    (0, 3, 3, 32),
    (1, 1, 3, 32),
    (2, 5, 3, 32),
    (3, 4, 2, 17),
    (4, 12, 4, 16),
    (2, 3, 8, 16),
    (1, 2, 3, 1025),
    (40, 4, 3, 1),
]


def make(shape: tuple, dtype: torch.dtype, device: str, layout: str = "channels", bias=True):
    """Inputs on a device: a random tree for each sequence, slots anywhere, all else NaN."""
    S, q, K, D = shape
    generator = torch.Generator().manual_seed(S + 10 * q)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    rng = random.Random(q)
    trees = [[rng.randrange(t) if t else -1 for t in range(q)] for _ in range(S)]
    predecessors = torch.tensor(trees, dtype=torch.int64).view(S, q)
    state = torch.full((2 * S + 1, D, K - 1), float("nan"), dtype=dtype)
    windows = torch.full((S + 2, q + 1, D, K - 1), float("nan"), dtype=dtype)
    slots = torch.randperm(2 * S + 1, generator=generator)[:S]
    state[slots] = randn(S, D, K - 1)
    if layout == "columns":  # channel after channel in memory, as vLLM keeps states
        state = state.transpose(1, 2).contiguous().transpose(1, 2)
        windows = windows.transpose(2, 3).contiguous().transpose(2, 3)
    bcx, weight = randn(S * q, 3 * D + 7)[:, 5:-2], randn(D, K)
    seen = branches(predecessors, K)
    inputs = (bcx, weight, randn(D) if bias else None, state, slots, seen, windows[:S, :q])
    return [x if x is None or device == "cpu" else x.to(device) for x in inputs]


def both(inputs: list) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs and windows of the naive twin and of the kernel."""
    *given, windows = inputs
    outs, left = [], []
    for run in (short_conv_drafts_naive, short_conv_drafts_triton):
        mine = windows.clone(memory_format=torch.preserve_format)
        out = given[0].new_full((given[0].shape[0], given[1].shape[0]), float("nan"))
        run(*given, mine, out)
        outs.append(out)
        left.append(mine)
    return outs, left


@pytest.mark.parametrize("layout", ["channels", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_naive(device: str, shape: tuple, dtype: torch.dtype, layout: str) -> None:
    inputs = make(shape, dtype, device, layout, bias=shape[1] % 2 == 0)
    before = inputs[3].clone()
    outs, windows = both(inputs)
    assert not outs[0].isnan().any()
    assert_within("short_conv", outs[1], outs[0])
    assert torch.equal(windows[0], windows[1])
    assert same_bits(inputs[3], before)


def test_a_chain_with_int32_slots_and_a_wider_state(device: str) -> None:
    """SGLang on a GPU may hand slots as int32; states of float32 hold bfloat16 values exactly."""
    inputs = make((3, 4, 3, 32), torch.bfloat16, device)
    inputs[5] = branches(chain(3, 4, inputs[0].device), 3)
    narrow_outs, narrow = both(inputs)
    inputs[3], inputs[4], inputs[6] = inputs[3].float(), inputs[4].int(), inputs[6].float()
    wide_outs, wide = both(inputs)
    assert_within("short_conv", narrow_outs[1], narrow_outs[0])
    assert torch.equal(narrow_outs[1], wide_outs[1])
    assert torch.equal(wide[0], wide[1])
    assert torch.equal(narrow[1].float(), wide[1])


def test_padding_reads_no_state(watch: Watch) -> None:
    """A captured graph's spare sequences have slot -1, before the first one."""
    bcx, weight, bias, state, slots, seen, windows = make((3, 2, 3, 32), torch.float32, "cpu")
    slots[1] = -1
    out = torch.empty(6, 32)
    short_conv_drafts_triton(bcx, weight, bias, state, slots, seen, windows, out)
    size = state[0].numel()
    touched = {int(at) // size for access in watch.of(state, False) for at in access.addresses}
    assert touched == set(slots.tolist()) - {-1}


@pytest.mark.parametrize("shape", [(2, 5, 3, 40), (4, 12, 4, 16)], ids=str)
def test_the_order_of_programs_does_not_matter(interpreted, monkeypatch, shape: tuple) -> None:
    monkeypatch.setattr(triton, "CHANNELS", 16)
    inputs = make(shape, torch.bfloat16, "cpu")
    (_, expected), (_, windows) = both(inputs)
    in_order(monkeypatch, lambda n: list(range(n - 1, -1, -1)))
    (_, out), (_, again) = both(inputs)
    assert torch.equal(out, expected)
    assert torch.equal(again, windows)


@pytest.mark.parametrize("K", [2, 3, 4])
def test_what_a_draft_touches(watch: Watch, K: int) -> None:
    """Of each draft C once, B and x of each place it sees that isn't in the state, the state if one is; a result and a
    state are left.
    """
    S, q, D = 2, 4, 32
    inputs = make((S, q, K, D), torch.bfloat16, "cpu")
    bcx, state, seen, windows = inputs[0], inputs[3], inputs[5], inputs[6]
    out = torch.empty(S * q, D, dtype=torch.bfloat16)
    short_conv_drafts_triton(*inputs, out)
    old = int((seen < K - 1).sum())
    reaching = int((seen < K - 1).any(dim=2).sum())
    values = 1 if K == 3 else K - 1  # two of 16 bits are read as one
    assert watch.count(state, stores=False) == reaching * values * D
    assert watch.count(bcx, stores=False) == (S * q + 2 * (S * q * K - old)) * D
    assert watch.count(out, stores=True) == S * q * D
    assert watch.count(windows, stores=True) == S * q * values * D
    assert watch.count(windows, stores=False) == 0


@pytest.mark.parametrize(
    ("backend", "arch"),
    [("cuda", "90"), matrix("cuda", "75"), matrix("cuda", "120"), matrix("hip", "gfx942")],
)
def test_gpus_that_are_not_here_compile_it(backend: str, arch: str) -> None:
    """As SGLang lays out its states, with and without a bias, at widths 3 and 8; no register is spilled."""
    fixed = {"weight_stride_channel": 1, "seen_stride_place": 1, "BLOCK": CHANNELS}
    columns = {
        3: dict.fromkeys(("state_stride_channel", "windows_stride_channel"), 1) | {"PAIRED": True},
        8: dict.fromkeys(("state_stride_channel", "windows_stride_channel"), 7) | {"PAIRED": False},
    }
    variants = {
        f"width {K}, bias {bias}": fixed | columns[K] | {"K": K, "HAS_BIAS": bias}
        for K, bias in ((3, False), (3, True), (8, False))
    }
    found = compiled("short_conv_drafts", variants, backend, arch)
    assert set(found) == set(variants)
    assert not any(variant.get("spilled") for variant in found.values())
    if (backend, arch) == ("cuda", "90"):
        published = found["width 3, bias False"]
        scalars = 1 + (3 - 1)  # the slot, the places before the draft's own
        assert published["loads"] - published["wide_loads"] == scalars
        assert published["stores"] == published["wide_stores"] == 1 + 2
