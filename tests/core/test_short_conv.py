"""The short convolution: native against naive, naive against torch's conv1d, and the state's life over many steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lfm2_plugin.conv_batch import ConvBatch
from lfm2_plugin.ops.short_conv import native, short_conv, short_conv_naive, short_conv_native
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
from tests.tolerances import assert_within

IMPLEMENTATIONS = {"naive": short_conv_naive, "native": short_conv_native}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_native_equals_naive(case: Case, dtype: torch.dtype) -> None:
    bcx, weight, bias, state, batch = make_step(case, dtype)
    outs, states = [], []
    for run in (short_conv_naive, short_conv_native):
        after = state.clone(memory_format=torch.preserve_format)
        out = torch.full((bcx.shape[0], case.dim), float("nan"), dtype=dtype)
        run(bcx, weight, bias, after, batch, out)
        outs.append(out)
        states.append(after)
    assert not outs[0].isnan().any()
    assert_within("short_conv", outs[1], outs[0])
    assert same_bits(states[0], states[1])


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_untouched(run) -> None:
    """What is not in the step keeps its bits; null and padding rows are exactly zero."""
    case = Case("", [1, 2, 1], [6, 5], nulls=[1, 4], padding=3, drafts=3)
    bcx, weight, bias, state, batch = make_step(case, torch.float32)
    before = state.clone()
    out = torch.full((bcx.shape[0], case.dim), float("nan"))
    run(bcx, weight, bias, state, batch, out)
    live = [int(batch.slots[s]) for s in (0, 2, 3)]
    others = [s for s in range(state.shape[0]) if s not in live]
    assert same_bits(state[others], before[others])
    assert before[others].isnan().all()
    assert same_bits(state[live][:, :, case.width - 1 :], before[live][:, :, case.width - 1 :])
    assert (out[1:3] == 0).all()
    assert (out[10:] == 0).all()
    assert (out[[0, *range(3, 10)]] != 0).any(dim=1).all()


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_whole_prompt_equals_conv1d(run, width: int, bias: bool) -> None:
    case = Case("", prefills=[23], fresh=[0], width=width, bias=bias, dim=24)
    bcx, weight, bias_values, state, batch = make_step(case, torch.float32)
    out = torch.empty(23, 24)
    run(bcx, weight, bias_values, state, batch, out)
    B, C, x = bcx.chunk(3, dim=-1)
    u = (B * x).T
    expected = F.conv1d(u[None], weight[:, None], bias_values, padding=width - 1, groups=24)
    assert_within("short_conv", out, C * expected[0, :, :23].T)
    assert torch.equal(state[batch.slots[0]], u[:, -(width - 1) :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_error_is_no_worse_than_conv1d(dtype: torch.dtype) -> None:
    case = Case("", prefills=[512], fresh=[0], dim=64)
    bcx, weight, _, state, batch = make_step(case, dtype)
    B, C, x = bcx.chunk(3, dim=-1)

    def conv(u: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
        return F.conv1d(u.T[None], taps[:, None], padding=2, groups=64)[0, :, :512].T

    exact = C.double() * conv(B.double() * x.double(), weight.double())
    theirs = (C * conv(B * x, weight)).double() - exact
    ours = short_conv(bcx, weight, None, state, batch).double() - exact
    assert ours.pow(2).mean() <= theirs.pow(2).mean() * 1.01


def run_in_chunks(run, bcx, weight, bias, chunks: list[int], decode: bool, dtype) -> tuple:
    """One sequence, fed piece by piece: the outputs end to end, and its last state."""
    K = weight.shape[1]
    state = torch.full((3, weight.shape[0], K - 1), float("nan"), dtype=dtype)
    outs, start = [], 0
    for n in chunks:
        is_decode = decode and start > 0
        batch = ConvBatch(
            slots=torch.tensor([2]),
            query_start=torch.tensor([0, n]),
            has_initial_state=torch.tensor([start > 0]),
            num_decodes=int(is_decode),
            num_decode_tokens=n * is_decode,
            num_prefills=int(not is_decode),
            num_prefill_tokens=n * (not is_decode),
        )
        out = torch.full((n, weight.shape[0]), float("nan"), dtype=dtype)
        run(bcx[start : start + n], weight, bias, state, batch, out)
        outs.append(out)
        start += n
    return torch.cat(outs), state[2]


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("chunks", "decode"),
    [
        ([7, 1, 12, 3, 7], False),
        ([1] * 30, False),
        ([1] * 30, True),
        ([16, *[1] * 14], True),
    ],
    ids=["chunks", "chunks-of-1", "decode-only", "prefill-then-decode"],
)
@pytest.mark.parametrize("width", [3, 5])
def test_pieces_equal_whole(run, dtype, chunks: list[int], decode: bool, width: int) -> None:
    """Bit for bit: where a text is cut must never show."""
    bcx, weight, bias, _, _ = make_step(Case("", prefills=[30], width=width, bias=True), dtype)
    whole, whole_state = run_in_chunks(run, bcx, weight, bias, [30], False, dtype)
    out, state = run_in_chunks(run, bcx, weight, bias, chunks, decode, dtype)
    assert torch.equal(out, whole)
    assert torch.equal(state, whole_state)


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("accepted", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_rejected_drafts_leave_no_trace(run, dtype, accepted: int, width: int) -> None:
    """Prefill, verify 4 tokens of which ``accepted`` are kept, go on: as if only the kept ones had ever been there."""
    D, drafts = 24, 3
    bcx, weight, _, _, _ = make_step(Case("", prefills=[20], width=width, dim=D), dtype)
    state = torch.full((2, D, width - 1 + drafts), float("nan"), dtype=dtype)

    def step(rows: torch.Tensor, *, decode: bool, kept: int | None) -> torch.Tensor:
        n = rows.shape[0]
        batch = ConvBatch(
            slots=torch.tensor([1]),
            query_start=torch.tensor([0, n]),
            has_initial_state=torch.tensor([decode]),
            num_decodes=int(decode),
            num_decode_tokens=n * decode,
            num_prefills=int(not decode),
            num_prefill_tokens=n * (not decode),
            max_decode_len=n if decode else 1,
            num_accepted=None if kept is None else torch.tensor([kept]),
        )
        out = torch.full((n, D), float("nan"), dtype=dtype)
        run(rows, weight, None, state, batch, out)
        return out

    step(bcx[:10], decode=False, kept=None)
    verified = step(bcx[10:14], decode=True, kept=1)
    tail = step(bcx[16:20], decode=True, kept=accepted)

    kept_rows = torch.cat([bcx[: 10 + accepted], bcx[16:20]])
    expected, _ = run_in_chunks(run, kept_rows, weight, None, [len(kept_rows)], False, dtype)
    assert torch.equal(verified[:accepted], expected[10 : 10 + accepted])
    assert torch.equal(tail, expected[-4:])


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_checkpoint_is_the_state_of_the_shorter_prompt(run) -> None:
    for offset in range(1, 8):
        case = Case("", prefills=[7, 4], checkpoints=[offset, 0], fresh=[0], width=4)
        bcx, weight, bias, state, batch = make_step(case, torch.float32)
        run(bcx, weight, bias, state, batch, torch.empty(11, case.dim))
        _, short = run_in_chunks(run, bcx[:7], weight, bias, [offset], False, torch.float32)
        assert torch.equal(state[batch.checkpoint_slots[0]], short)
        assert state[batch.checkpoint_slots[1]].isnan().all()


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_checkpoint_into_the_null_slot_is_none(run) -> None:
    bcx, weight, bias, state, batch = make_step(
        Case("", prefills=[7, 4], checkpoints=[3, 2]), torch.float32
    )
    batch.checkpoint_slots[0] = NULL
    run(bcx, weight, bias, state, batch, torch.empty(11, 32))
    assert state[NULL].isnan().all()
    assert not state[batch.checkpoint_slots[1]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2, 8])
def test_long_prefill_is_taken_in_pieces(monkeypatch, dtype, width: int) -> None:
    """Pieces of 32 rows, so that every tap reaches over a seam, in and out of step with sequences."""
    case = Case("", decodes=[1], prefills=[70, 3, 33, 64, 20], fresh=[2, 4], width=width)
    bcx, weight, bias, state, batch = make_step(case, dtype)
    whole_state = state.clone()
    whole = short_conv(bcx, weight, bias, whole_state, batch)
    monkeypatch.setattr(native, "_PIECE_BYTES", 1)
    assert torch.equal(short_conv(bcx, weight, bias, state, batch), whole)
    assert same_bits(state, whole_state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_company_changes_no_bit(run, dtype) -> None:
    assert_invariant(run, make_step(COMPANY, dtype))


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_state_in_another_dtype(run) -> None:
    """A float32 state holds bfloat16 values exactly."""
    case = Case("", decodes=[1, 1], prefills=[6, 1], fresh=[2])
    bcx, weight, bias, state, batch = make_step(case, torch.bfloat16)
    wide = state.float()
    narrow_out, wide_out = torch.empty(9, 32).bfloat16(), torch.empty(9, 32).bfloat16()
    run(bcx, weight, bias, state, batch, narrow_out)
    run(bcx, weight, bias, wide, batch, wide_out)
    assert torch.equal(narrow_out, wide_out)
    assert same_bits(state.float(), wide)


def test_strided_pages() -> None:
    """States of several layers lie in one page; one layer's view skips the others'."""
    case = Case("", decodes=[1, 1], prefills=[6, 1], fresh=[3])
    bcx, weight, bias, state, batch = make_step(case, torch.float32)
    pages = torch.full((state.shape[0], 3, 2, case.dim), float("nan"))
    view = pages[:, 1].transpose(1, 2)
    view.copy_(state)
    expected = short_conv(bcx, weight, bias, state, batch)
    assert torch.equal(short_conv(bcx, weight, bias, view, batch), expected)
    assert same_bits(view, state)
    assert pages[:, 0].isnan().all()
    assert pages[:, 2].isnan().all()


def test_door_uses_the_given_out() -> None:
    bcx, weight, bias, state, batch = make_step(CASES[2], torch.float32)
    out = torch.full((bcx.shape[0], 64), float("nan"))[:, ::2]
    given = short_conv(bcx, weight, bias, state.clone(), batch, out)
    assert given is out
    assert torch.equal(out, short_conv(bcx, weight, bias, state, batch))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(32, 9)}, "K in 2..8"),
        ({"weight": torch.zeros(31, 3)}, r"bcx must be \(T, 93\)"),
        ({"weight": torch.zeros(32, 3).bfloat16()}, "weight and bias must be torch.float32"),
        ({"bias": torch.zeros(31)}, r"bias must be \(32,\)"),
        ({"state": torch.zeros(9, 32, 1)}, "at least 2"),
        ({"state": torch.zeros(9, 2, 32)}, "state must be"),
        ({"bcx": torch.zeros(1, 96)}, "the batch has 2 tokens, bcx only 1"),
        ({"out": torch.zeros(2, 31)}, r"out must be \(2, 32\)"),
        ({"slots": torch.zeros(3)}, "slots has 3 entries for 2 sequences"),
        ({"query_start": torch.zeros(2)}, "query_start has 2 entries for 2"),
        ({"has_initial_state": torch.zeros(1)}, "has_initial_state has 1 entries for 2"),
        ({"max_decode_len": 3}, "decodes of up to 3 tokens"),
        ({"checkpoint_slots": torch.zeros(0)}, "go together"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_door_refuses(change: dict, message: str) -> None:
    bcx, weight, bias, state, batch = make_step(Case("", decodes=[1, 1]), torch.float32)
    arguments = {"bcx": bcx, "weight": weight, "bias": bias, "state": state, "out": None}
    for name, value in change.items():
        if name in arguments:
            arguments[name] = value
        else:
            setattr(batch, name, value)
    with pytest.raises(ValueError, match=message):
        short_conv(**arguments, batch=batch)
