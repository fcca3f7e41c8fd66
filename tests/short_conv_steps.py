"""Steps for the tests of the short convolution: every kind of sequence, and what may not be read or written as NaN."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lfm2_plugin.conv_batch import ConvBatch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NULL = 0


@dataclass
class Case:
    """One step. ``decodes`` and ``prefills`` are query lengths; the other lists run parallel to them."""

    name: str
    decodes: list[int] = field(default_factory=list)
    prefills: list[int] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)  # indices of sequences without history
    nulls: list[int] = field(default_factory=list)  # indices of sequences in the null slot
    accepted: list[int] | None = None
    checkpoints: list[int] | None = None
    padding: int = 0
    dim: int = 32
    width: int = 3
    bias: bool = False
    drafts: int = 0  # spare state columns

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("empty"),
    Case("only-padding", padding=3),
    Case("decode-1", decodes=[1]),
    Case("decode-5", decodes=[1] * 5),
    Case("decode-fresh", decodes=[1, 1, 1], fresh=[1]),
    Case("decode-null", decodes=[1, 1, 1, 1], nulls=[1, 3], padding=2),
    Case("decode-all-null", decodes=[1, 1], nulls=[0, 1]),
    Case("decode-odd-dim-bias", decodes=[1, 1], dim=63, bias=True),
    Case("prefill-1-token", prefills=[1]),
    Case("prefill-2-tokens", prefills=[2], fresh=[0]),
    Case("prefill-whole", prefills=[17], fresh=[0]),
    Case("prefill-with-state", prefills=[17]),
    Case("prefill-many", prefills=[5, 1, 2, 31, 3, 1], fresh=[0, 2, 5], bias=True),
    Case("prefill-all-short", prefills=[1, 2, 1, 2], fresh=[3], width=4),
    Case("prefill-empty-query", prefills=[4, 0, 3, 0], fresh=[0, 1]),
    Case("decode-empty-query", decodes=[1, 0, 1], prefills=[3], fresh=[1]),
    Case("prefill-null", prefills=[4, 6, 3], nulls=[1], padding=4),
    Case("prefill-checkpoint", prefills=[9, 7, 1], checkpoints=[4, 0, 1], fresh=[0]),
    Case("prefill-checkpoint-early", prefills=[9, 6], checkpoints=[1, 2], fresh=[1], width=4),
    Case("prefill-checkpoint-at-end", prefills=[9, 6], checkpoints=[9, 6]),
    Case("mixed", decodes=[1, 1, 1], prefills=[12, 5], fresh=[3]),
    Case("mixed-null-padding", decodes=[1, 1], prefills=[8, 1, 7], nulls=[0, 3], padding=5, dim=33),
    Case("drafts-all", decodes=[4, 4], accepted=[1, 4], drafts=3),
    Case("drafts-ragged", decodes=[4, 1, 3], accepted=[2, 1, 4], drafts=3),
    Case("drafts-fresh-null", decodes=[3, 1, 2, 1], accepted=[1, 1, 3, 2], fresh=[1], nulls=[2], drafts=3),
    Case("drafts-mixed", decodes=[3, 2], prefills=[9, 1], accepted=[3, 2], fresh=[3], drafts=2),
    Case("drafts-8", decodes=[9, 9, 2], accepted=[9, 5, 1], drafts=8, dim=96),
    Case("accepted-without-drafts", decodes=[1, 1], accepted=[1, 3], drafts=2),
    Case("spare-columns", decodes=[1], prefills=[5, 1], drafts=4),
    *[
        Case(
            f"width-{width}",
            decodes=[1, 2],
            prefills=[1, width - 1, width, 20],
            accepted=[2, 1],
            checkpoints=[0, 1, width - 1, 7],
            fresh=[3],
            width=width,
            drafts=1,
            dim=40,
            bias=width % 2 == 0,
        )
        for width in range(2, 9)
    ],
]  # fmt: skip


def make_step(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple:
    """Inputs of one step. Slots in use hold numbers; the null slot and unused ones hold NaN."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    lengths = case.decodes + case.prefills
    S, T = len(lengths), sum(lengths) + case.padding
    num_slots = 2 * S + len(case.prefills) + 2
    slots = (torch.randperm(num_slots - 1, generator=generator) + 1)[: S + len(case.prefills)]
    used, copies = slots[:S].clone(), slots[S:]
    used[case.nulls] = NULL
    has_state = torch.ones(S, dtype=torch.bool)
    has_state[case.fresh] = False

    columns = case.width - 1 + case.drafts
    state = torch.full((num_slots, columns, case.dim), float("nan"), dtype=dtype).transpose(1, 2)
    for s in range(S):
        if used[s] != NULL and has_state[s]:
            state[used[s]] = randn(case.dim, columns)
    batch = ConvBatch(
        slots=used.int(),
        query_start=torch.tensor([0, *lengths]).cumsum(0).int(),
        has_initial_state=has_state,
        num_decodes=len(case.decodes),
        num_decode_tokens=sum(case.decodes),
        num_prefills=len(case.prefills),
        num_prefill_tokens=sum(case.prefills),
        max_decode_len=max(case.decodes, default=1),
        num_accepted=None if case.accepted is None else torch.tensor(case.accepted).int(),
        checkpoint_offsets=None
        if case.checkpoints is None
        else torch.tensor(case.checkpoints).int(),
        checkpoint_slots=None if case.checkpoints is None else copies.int(),
        null_slot=NULL,
    )
    bcx = randn(T, 3 * case.dim + 7)[:, 5:-2]  # a view, so that a wrong stride shows
    bcx[sum(lengths) :] = float("nan")  # padding rows hold anything
    bias = randn(case.dim) if case.bias else None
    return bcx, randn(case.dim, case.width), bias, state, batch


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """torch.equal that takes NaN for equal to NaN."""
    as_int = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.contiguous().view(as_int), b.contiguous().view(as_int))


def one_of(batch: ConvBatch, index: int) -> tuple[slice, ConvBatch]:
    """The rows of one sequence of a step, and the step that has it alone."""
    start, end = (int(place) for place in batch.query_start[index : index + 2])
    decodes = index < batch.num_decodes
    prefill = slice(index - batch.num_decodes, index - batch.num_decodes + 1)

    def pick(values: torch.Tensor | None, kept: bool, where: slice) -> torch.Tensor | None:
        return values[where] if values is not None and kept else None

    alone = ConvBatch(
        slots=batch.slots[index : index + 1],
        query_start=batch.query_start[index : index + 2] - start,
        has_initial_state=batch.has_initial_state[index : index + 1],
        num_decodes=int(decodes),
        num_decode_tokens=(end - start) * decodes,
        num_prefills=int(not decodes),
        num_prefill_tokens=(end - start) * (not decodes),
        max_decode_len=batch.max_decode_len,
        num_accepted=pick(batch.num_accepted, decodes, slice(index, index + 1)),
        checkpoint_offsets=pick(batch.checkpoint_offsets, not decodes, prefill),
        checkpoint_slots=pick(batch.checkpoint_slots, not decodes, prefill),
        null_slot=batch.null_slot,
    )
    return slice(start, end), alone


COMPANY = Case(
    "company",
    decodes=[1, 3, 1],
    prefills=[40, 1, 2, 9],
    accepted=[1, 2, 1],
    checkpoints=[17, 0, 1, 9],
    fresh=[3],
    padding=6,
    drafts=2,
    dim=41,
)
"""Every kind of sequence in one step, and channels that are no multiple of a vector."""


def assert_invariant(run, step: tuple) -> None:
    """Of every sequence the same output and states, to the bit, alone and in company."""
    bcx, weight, bias, state, batch = step
    together = state.clone(memory_format=torch.preserve_format)
    out = bcx.new_empty(bcx.shape[0], weight.shape[0])
    run(bcx, weight, bias, together, batch, out)
    for index in range(batch.num_sequences):
        rows, alone = one_of(batch, index)
        after = state.clone(memory_format=torch.preserve_format)
        mine = bcx.new_empty(rows.stop - rows.start, weight.shape[0])
        run(bcx[rows], weight, bias, after, alone, mine)
        assert torch.equal(mine, out[rows]), f"sequence {index}"
        slots = [int(alone.slots[0])]
        if alone.checkpoint_offsets is not None and alone.checkpoint_offsets[0] > 0:
            slots.append(int(alone.checkpoint_slots[0]))
        assert same_bits(after[slots], together[slots]), f"sequence {index}"
