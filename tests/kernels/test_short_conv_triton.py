"""The short convolution's Triton kernel against its naive twin, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from lfm2_plugin.ops.short_conv import short_conv_naive, triton
from lfm2_plugin.ops.short_conv.triton import ROWS, short_conv_triton
from tests.kernels.interpreter import Watch, in_order
from tests.short_conv_steps import (
    CASES,
    COMPANY,
    DTYPES,
    NULL,
    Case,
    assert_invariant,
    make_step,
    same_bits,
)
from tests.tiers import matrix
from tests.tolerances import assert_within

LARGE = [
    Case("long-prefill", prefills=[3 * ROWS + 5], fresh=[0], checkpoints=[ROWS + 1]),
    Case("row-blocks-begin-anywhere", decodes=[1] * 3, prefills=[ROWS, ROWS - 1, ROWS + 1, 1, 50]),
    Case("nulls-between", prefills=[20, 20, 20], nulls=[1], padding=ROWS + 3),
    Case("one-channel", decodes=[1, 1], prefills=[9], dim=1),
    Case("more-channels-than-a-program", decodes=[1], prefills=[5], dim=1025),
]
BFLOAT16_FIRST = [
    torch.bfloat16 if dtype == torch.bfloat16 else matrix(dtype, id=str(dtype)) for dtype in DTYPES
]


@pytest.fixture
def step(device: str):
    """Makes the step of a case on the device; arguments and results as of ``make_step``."""

    def make(case: Case, dtype: torch.dtype) -> tuple:
        *tensors, batch = make_step(case, dtype)
        moved = [x if x is None else to_device(x, device) for x in tensors]
        fields = {name: value for name, value in vars(batch).items() if torch.is_tensor(value)}
        return *moved, replace(batch, **{k: v.to(device) for k, v in fields.items()})

    return make


def to_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """With its strides, which ``to`` may change."""
    if device == "cpu":
        return tensor
    size = 1 + sum((n - 1) * by for n, by in zip(tensor.shape, tensor.stride(), strict=True))
    there = torch.empty(max(size, 0), dtype=tensor.dtype, device=device)
    return there.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def both(step, case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs and states of the naive twin and of the kernel."""
    bcx, weight, bias, state, batch = step(case, dtype)
    outs, states = [], []
    for run in (short_conv_naive, short_conv_triton):
        after = state.clone(memory_format=torch.preserve_format)
        out = torch.full((bcx.shape[0], case.dim), float("nan"), dtype=dtype, device=bcx.device)
        run(bcx, weight, bias, after, batch, out)
        outs.append(out)
        states.append(after)
    return outs, states


@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_triton_equals_naive(step, case: Case, dtype: torch.dtype) -> None:
    outs, states = both(step, case, dtype)
    assert not outs[0].isnan().any()
    assert_within("short_conv", outs[1], outs[0])
    assert same_bits(states[0], states[1])


@pytest.mark.matrix
def test_a_thousand_sequences(step) -> None:
    """One dtype: the interpreter takes some 20 ms a program."""
    case = Case(
        "", [1] * 600, [1, 2, 3, 4, 5] * 80, fresh=[7, 650], nulls=[3, 599, 640], padding=24, dim=8
    )
    outs, states = both(step, case, torch.bfloat16)
    assert_within("short_conv", outs[1], outs[0])
    assert same_bits(states[0], states[1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_channels_in_blocks(step, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """As in the published models, whose 2,048 channels are those of two programs."""
    monkeypatch.setattr(triton, "CHANNELS", 16)
    outs, states = both(step, case, torch.float32)
    assert_within("short_conv", outs[1], outs[0])
    assert same_bits(states[0], states[1])


ORDERS = {
    "backwards": lambda n: list(range(n - 1, -1, -1)),
    "odd first": lambda n: [*range(1, n, 2), *range(0, n, 2)],
    "shuffled": lambda n: random.Random(n).sample(range(n), n),
}


ORDERED = {"decode-null", "prefill-checkpoint", "mixed-null-padding", "drafts-mixed", "width-4"}
"""Every kind of sequence. That of all cases no program touches what another writes is the next test's."""


@pytest.mark.parametrize("order", [matrix("backwards"), matrix("odd first"), "shuffled"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ORDERED] + [c for c in LARGE if c.dim < 1000], ids=str
)
def test_the_order_of_programs_does_not_matter(
    interpreted, monkeypatch, case: Case, order: str
) -> None:
    monkeypatch.setattr(triton, "CHANNELS", 16)
    bcx, weight, bias, state, batch = make_step(case, torch.bfloat16)
    results = []
    for permuted in (False, True):
        batch.indices.clear()
        after = state.clone(memory_format=torch.preserve_format)
        out = torch.full((bcx.shape[0], case.dim), float("nan"), dtype=torch.bfloat16)
        if permuted:
            in_order(monkeypatch, ORDERS[order])
        short_conv_triton(bcx, weight, bias, after, batch, out)
        results.append((out, after))
    assert torch.equal(results[0][0], results[1][0])
    assert same_bits(results[0][1], results[1][1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_two_programs_share_a_state(watch: Watch, monkeypatch, case: Case) -> None:
    """By the accesses themselves: of what a program writes, no other reads or writes anything."""
    monkeypatch.setattr(triton, "CHANNELS", 16)
    bcx, weight, bias, state, batch = make_step(case, torch.float32)
    out = torch.empty(bcx.shape[0], case.dim)
    short_conv_triton(bcx, weight, bias, state, batch, out)
    for tensor in (state, out):
        owner: dict[int, tuple[int, ...]] = {}
        accesses = [*watch.of(tensor, stores=True), *watch.of(tensor, stores=False)]
        for access in accesses:
            for address in access.addresses.tolist():
                assert owner.setdefault(address, access.program) == access.program
    assert watch.count(out, stores=True) == out.numel()
    # In each program the reads of a state come first; only the checkpoint's and its own writes follow.
    for program, group in itertools.groupby(
        (a for a in watch.accesses if _touches(a, state)), key=lambda access: access.program
    ):
        kinds = [access.stores for access in group if access.addresses.size]
        assert kinds == sorted(kinds), program


def _touches(access, tensor: torch.Tensor) -> bool:
    begin = tensor.untyped_storage().data_ptr()
    inside = (access.addresses >= begin) & (
        access.addresses < begin + tensor.untyped_storage().nbytes()
    )
    return bool(inside.any())


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_a_decode_touches_each_element_once(watch: Watch, width: int) -> None:
    """The floor: 3 values a token and channel read, 1 written, the state read and written."""
    S, D = 5, 32
    bcx, weight, bias, state, batch = make_step(Case("", [1] * S, width=width), torch.bfloat16)
    out = torch.empty(S, D, dtype=torch.bfloat16)
    short_conv_triton(bcx, weight, bias, state, batch, out)
    assert watch.count(bcx, stores=False) == 3 * S * D
    assert watch.count(out, stores=True) == S * D
    assert watch.count(state, stores=False) == (width - 1) * S * D
    assert watch.count(state, stores=True) == (width - 1) * S * D


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_what_a_prefill_reads_twice(watch: Watch, width: int) -> None:
    """B and x of the K - 1 rows before each block of rows; of the first K - 1 tokens, B, C, x; of the last, B and x."""
    blocks, D = 4, 32
    T = blocks * ROWS
    bcx, weight, bias, state, batch = make_step(Case("", prefills=[T], width=width), torch.bfloat16)
    out = torch.empty(T, D, dtype=torch.bfloat16)
    short_conv_triton(bcx, weight, bias, state, batch, out)
    before = width - 1
    slid = 2 * T + (T - before) + 2 * before * (blocks - 1)
    assert watch.count(bcx, stores=False) == (slid + 3 * before + 2 * before) * D
    assert watch.count(out, stores=True) == T * D
    assert watch.count(state, stores=False) == before * D
    assert watch.count(state, stores=True) == before * D


def test_rows_of_decodes_are_read_by_their_sequences_only(watch: Watch) -> None:
    """A decode of 64 sequences in a step padded to 80 rows: the programs for rows write the zeros, and read nothing."""
    case = Case("", [1] * 64, padding=16)
    bcx, weight, bias, state, batch = make_step(case, torch.bfloat16)
    short_conv_triton(bcx, weight, bias, state, batch, torch.empty(80, 32).bfloat16())
    assert watch.count(bcx, stores=False) == 3 * 64 * 32


def test_one_launch_for_any_mix(step) -> None:
    """Captured with num_decodes = 0, decodes are prefills of one token: the same numbers to the bit."""
    case = Case("", decodes=[1] * 5, prefills=[7, 1, 40], fresh=[6], nulls=[2], padding=4)
    bcx, weight, bias, state, batch = step(case, torch.bfloat16)
    after, out = state.clone(), bcx.new_empty(bcx.shape[0], 32)
    short_conv_triton(bcx, weight, bias, after, batch, out)
    batch.indices.clear()
    batch.num_decodes, batch.num_prefills = 0, batch.num_sequences
    again = torch.empty_like(out)
    short_conv_triton(bcx, weight, bias, state, batch, again)
    assert torch.equal(out, again)
    assert same_bits(after, state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_company_changes_no_bit(step, dtype: torch.dtype) -> None:
    assert_invariant(short_conv_triton, step(COMPANY, dtype))


def test_sequences_without_tokens_at_the_end_are_padding(step) -> None:
    """As an engine pads a captured decode: more sequences than there are, none of them with a row."""
    case = Case("", decodes=[1, 1, 0, 0, 0], nulls=[2, 3, 4], padding=3)
    outs, states = both(step, case, torch.float32)
    assert_within("short_conv", outs[1], outs[0])
    assert (outs[1][2:] == 0).all()
    assert same_bits(states[0], states[1])


def test_state_of_sglang_and_of_packed_pages(step) -> None:
    """Channels first, and a layer's columns in a page among other layers'."""
    case = Case("", decodes=[1, 1], prefills=[6, 1], fresh=[3])
    bcx, weight, bias, state, batch = step(case, torch.float32)
    expected = bcx.new_empty(bcx.shape[0], 32)
    channels_first = state.contiguous()
    pages = bcx.new_full((state.shape[0], 3, 2, 32), float("nan"))
    packed = pages[:, 1].transpose(1, 2)
    packed.copy_(state)
    short_conv_naive(bcx, weight, bias, state, batch, expected)
    for view in (channels_first, packed):
        out = torch.empty_like(expected)
        short_conv_triton(bcx, weight, bias, view, batch, out)
        assert_within("short_conv", out, expected)
        assert same_bits(view, state)
    assert pages[:, 0].isnan().all()
    assert pages[:, 2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_values_side_by_side_are_one_access(watch: Watch, step, dtype: torch.dtype) -> None:
    """SGLang's layout at width 3 and 16 bits: to the bit what other layouts give, with half as many accesses."""
    case = Case("", [1, 1, 1], [7, 1, 2, 40], fresh=[4], nulls=[1], checkpoints=[3, 0, 1, 38])
    bcx, weight, bias, state, batch = step(case, dtype)
    room = state.new_empty(state.numel() + 1)
    odd = room[1:].view(state.shape).copy_(state)  # no 32-bit integer lies there
    layouts = {"apart": state, "together": state.contiguous(), "odd": odd}
    outs, counts = {}, {}
    for name, view in layouts.items():
        watch.accesses.clear()
        batch.indices.clear()
        outs[name] = bcx.new_empty(bcx.shape[0], 32)
        short_conv_triton(bcx, weight, bias, view, batch, outs[name])
        counts[name] = [watch.count(view, stores) for stores in (False, True)]
        assert torch.equal(outs[name], outs["apart"])
        assert same_bits(view, state)
    with_history = 5  # of seven sequences one is null and one has none
    assert counts["apart"][0] == counts["odd"][0] == 32 * 2 * with_history
    assert counts["together"][0] == 32 * with_history
    assert counts["apart"][1] == counts["odd"][1] == 2 * counts["together"][1]


def test_slots_with_a_stride(step) -> None:
    """As vLLM has them where there are drafts: the first column of a table."""
    case = Case("", decodes=[1, 1, 1], prefills=[4], nulls=[1], padding=2)
    bcx, weight, bias, state, batch = step(case, torch.float32)
    expected, after = bcx.new_empty(bcx.shape[0], 32), state.clone()
    short_conv_triton(bcx, weight, bias, after, batch, expected)
    table = torch.full((4, 3), 77, dtype=batch.slots.dtype, device=bcx.device)
    table[:, 0] = batch.slots
    strided = replace(batch, slots=table[:, 0], indices={})
    out = torch.empty_like(expected)
    short_conv_triton(bcx, weight, bias, state, strided, out)
    assert torch.equal(out, expected)
    assert same_bits(state, after)


def test_inputs_and_outputs_with_strides(step) -> None:
    case = Case("", decodes=[1], prefills=[5])
    bcx, weight, bias, state, batch = step(case, torch.float32)
    expected = bcx.new_empty(6, 32)
    short_conv_naive(bcx, weight, bias, state.clone(), batch, expected)
    out = bcx.new_full((6, 64), float("nan"))[:, ::2]
    columns = bcx.t().contiguous().t()
    taps = weight.t().contiguous().t()
    short_conv_triton(columns, taps, bias, state, batch, out)
    assert_within("short_conv", out, expected)


def test_state_in_another_dtype(step) -> None:
    """A float32 state holds bfloat16 values exactly."""
    case = Case("", decodes=[1, 1], prefills=[6, 1], fresh=[2], checkpoints=[4, 0])
    bcx, weight, bias, state, batch = step(case, torch.bfloat16)
    wide = state.float()
    narrow_out, wide_out = (bcx.new_empty(9, 32) for _ in range(2))
    short_conv_triton(bcx, weight, bias, state, batch, narrow_out)
    short_conv_triton(bcx, weight, bias, wide, batch, wide_out)
    assert torch.equal(narrow_out, wide_out)
    assert same_bits(state.float(), wide)
    assert state[NULL].isnan().all()


REPLAYED = [
    Case("", prefills=[1] * 6, padding=58),
    Case("", prefills=[1, 1, 40, 2, 1, 7], fresh=[2], nulls=[4], padding=12),
    Case("", prefills=[1, 0, 0, 0, 0, 0], nulls=[1, 2, 3, 4, 5], padding=63),
]
"""Steps of as many sequences and rows: what one captured graph is replayed with."""


def test_nothing_is_kept_from_launch_to_launch(step) -> None:
    """A graph's launches see one ConvBatch, whose tensors every replay writes over; so do those of a second graph."""
    batch = step(REPLAYED[0], torch.float32)[-1]
    for case in REPLAYED:
        bcx, weight, bias, state, new = step(case, torch.float32)
        for name in ("slots", "query_start", "has_initial_state"):
            getattr(batch, name).copy_(getattr(new, name))
        after, expected = state.clone(), bcx.new_empty(64, 32)
        short_conv_naive(bcx, weight, bias, after, new, expected)
        out = torch.full_like(expected, float("nan"))
        short_conv_triton(bcx, weight, bias, state, batch, out)
        assert_within("short_conv", out, expected)
        assert same_bits(state, after)
    assert batch.indices == {}


def test_one_captured_graph_serves_any_mix(step, device: str) -> None:
    """Captured with one step, replayed with others of as many sequences and rows."""
    if device == "cpu":
        pytest.skip("a CUDA graph needs a GPU")
    bcx, weight, bias, state, batch = step(REPLAYED[0], torch.bfloat16)
    out = torch.empty(64, 32, dtype=bcx.dtype, device=device)
    for _ in range(2):
        short_conv_triton(bcx, weight, bias, state, batch, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        short_conv_triton(bcx, weight, bias, state, batch, out)
    for case in REPLAYED:
        new_bcx, _, _, new_state, new = step(case, torch.bfloat16)
        bcx.copy_(new_bcx)
        state.copy_(new_state)
        for name in ("slots", "query_start", "has_initial_state"):
            getattr(batch, name).copy_(getattr(new, name))
        expected = torch.empty_like(out)
        short_conv_naive(bcx, weight, bias, new_state, new, expected)
        out.fill_(float("nan"))
        graph.replay()
        assert_within("short_conv", out, expected)
        assert same_bits(state, new_state)
