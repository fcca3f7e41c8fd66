"""The short convolution in vectorised torch: no loop over sequences, any device that torch knows.

Two ways of looking at the tokens share the work:

- :func:`_stream` slides over the prefill tokens as one long text. That is right for every token but
  the first K - 1 of a sequence (these would see their neighbour's tokens), and it copies nothing.
- :func:`_block` lays the first tokens of each sequence behind its history in a padded block. It does
  the decodes, and it repairs the first K - 1 tokens of each prefill.

What can be derived from the batch alone is derived once a step (:func:`_make_plan`), not once a
layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lfm2_plugin.conv_batch import ConvBatch

# Float32 temporaries of the stream, bytes. A step's tokens are taken in pieces of this size so that
# they are still in the cache for the next tap. Measured with D = 2048, bfloat16, one Zen 4 core:
# pieces of 64 to 512 rows are alike, a whole prompt of 2048 rows is 1.6x slower, and torch's own
# depthwise conv1d 5 to 8x slower than pieces.
_PIECE_BYTES = 1 << 21


@dataclass
class _Block:
    """Sequences to convolve as a padded block: N sequences of up to ``width`` tokens.

    Attributes:
        slots: (N,) int64.
        fresh: (N, 1, 1) bool, True where the history is zeros; None if no sequence is fresh.
        columns: (N, K - 1) int64 state columns of the history; None means the first K - 1.
        rows: (N * width,) int64 row of each token of the block, the last one again past a
            sequence's end; a slice if the rows are adjacent.
        width: tokens per sequence in the block.
        live: which of the N * width are tokens, and their rows, (M,) int64 each; None if all are.
    """

    slots: torch.Tensor
    fresh: torch.Tensor | None
    columns: torch.Tensor | None
    rows: torch.Tensor | slice
    width: int
    live: tuple[torch.Tensor, torch.Tensor] | None


@dataclass
class _Tail:
    """Where the K - 1 values of a prefill's new state come from, and where they go.

    Attributes:
        slots: (M,) int64, destination.
        rows: (M * (K - 1),) int64 rows of bcx.
        in_block: None if the query alone fills every state; else (M, K - 1) bool, True where the
            value comes from the block of the sequence's history and first tokens.
        source: (M, K - 1) int64 position in that block, flattened over (N, 2 * (K - 1)).
    """

    slots: torch.Tensor
    rows: torch.Tensor
    in_block: torch.Tensor | None
    source: torch.Tensor


@dataclass
class _Plan:
    """A step's index tensors; ``written``: (sequence, column) pairs of state that ragged decodes write."""

    first_prefill_row: int
    end: int
    decodes: _Block | None
    written: tuple[torch.Tensor, torch.Tensor] | None
    prefills: _Block | None
    stream: bool
    tails: list[_Tail]
    dead_rows: torch.Tensor | None


def short_conv_native(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    batch: ConvBatch,
    out: torch.Tensor,
) -> None:
    """See :func:`lfm2_plugin.ops.short_conv.short_conv`; writes ``out`` (T, D) and ``state`` (slots, D, L)."""
    K = weight.shape[1]
    key = f"native-{K}"
    plan = batch.indices.get(key)
    if not isinstance(plan, _Plan):
        plan = batch.indices[key] = _make_plan(batch, K, bcx.device)

    taps = weight.t().to(torch.float32, memory_format=torch.contiguous_format)  # (K, D)
    bias32 = None if bias is None else bias.float()
    cells = state.transpose(1, 2)  # (slots, L, D)
    if plan.end < bcx.shape[0]:
        out[plan.end :].zero_()
    if plan.decodes is not None:
        if plan.decodes.width == 1 and isinstance(plan.decodes.rows, slice):
            _single_tokens(bcx, taps, bias32, cells, plan.decodes, out)
        else:
            values = _block(bcx, taps, bias32, cells, plan.decodes, out)
            _write_decodes(cells, values, plan)
    if plan.prefills is not None:
        if plan.stream:
            rows = slice(plan.first_prefill_row, plan.end)
            _stream(bcx[rows], taps, bias32, out[rows])
        values = _block(bcx, taps, bias32, cells, plan.prefills, out)
        for tail in plan.tails:
            _write_tail(cells, bcx, values, tail)
    if plan.dead_rows is not None:
        out.index_fill_(0, plan.dead_rows, 0)


def _stream(
    bcx: torch.Tensor, taps: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Convolve bcx (T, 3 * D) into out (T, D) as if it were one sequence with zeros before it."""
    K, D = taps.shape
    T, dtype = bcx.shape[0], bcx.dtype
    B, C, x = bcx.split(D, dim=-1)
    step = min(T, max(32, _PIECE_BYTES // (4 * D)))
    u = bcx.new_empty(step + K - 1, D)
    u32 = u if dtype == torch.float32 else torch.empty_like(u, dtype=torch.float32)
    total = torch.empty_like(u32)
    rounded = total if dtype == torch.float32 else u
    for start in range(0, T, step):
        end = min(start + step, T)
        before = min(start, K - 1)  # rows of the piece before, needed again
        n, m = end - start, end - start + before
        torch.mul(B[start - before : end], x[start - before : end], out=u[:m])
        if u32 is not u:
            u32[:m].copy_(u[:m])
        y = total[:n]
        torch.mul(u32[before:m], taps[K - 1], out=y)
        for back in range(1, K):
            skip = max(back - before, 0)  # rows that this tap does not reach at the very start
            if skip < n:
                y[skip:].addcmul_(u32[before + skip - back : m - back], taps[K - 1 - back])
        if bias is not None:
            y += bias
        if rounded is not total:
            rounded[:n].copy_(y)
        torch.mul(C[start:end], rounded[:n], out=out[start:end])


def _history(cells: torch.Tensor, block: _Block, K: int, dtype: torch.dtype) -> torch.Tensor:
    """The values before a block's tokens, oldest first, (N, K - 1, D) in ``dtype``: of the states, or zeros."""
    if block.columns is None:
        history = cells[:, : K - 1].index_select(0, block.slots)
    else:
        history = cells[block.slots[:, None], block.columns]
    if block.fresh is not None:
        history.masked_fill_(block.fresh, 0)
    return history.to(dtype)


def _single_tokens(
    bcx: torch.Tensor,
    taps: torch.Tensor,
    bias: torch.Tensor | None,
    cells: torch.Tensor,
    block: _Block,
    out: torch.Tensor,
) -> None:
    """What :func:`_block` and :func:`_write_decodes` do, for decodes of one token in adjacent rows, with less copying.

    The step of every plain decode. Measured with D = 2048, bfloat16, two Zen 4 cores: 8 sequences 2.0x faster than as a
    block (each of whose tensors is just large enough for torch to share it among the cores), 32 sequences 1.4x.
    """
    K, D = taps.shape
    history = _history(cells, block, K, bcx.dtype)
    B, C, x = bcx[block.rows].split(D, dim=-1)
    value = B * x
    total = value.float() * taps[K - 1]
    for k in reversed(range(K - 1)):
        total.addcmul_(history[:, k].float(), taps[k])
    if bias is not None:
        total += bias
    torch.mul(C, total.to(bcx.dtype), out=out[block.rows])
    for k in range(K - 2):
        cells[:, k].index_copy_(0, block.slots, history[:, k + 1].to(cells.dtype))
    cells[:, K - 2].index_copy_(0, block.slots, value.to(cells.dtype))


def _block(
    bcx: torch.Tensor,
    taps: torch.Tensor,
    bias: torch.Tensor | None,
    cells: torch.Tensor,
    block: _Block,
    out: torch.Tensor,
) -> torch.Tensor:
    """Convolve a block into ``out``; gives history and values back, (N, K - 1 + width, D) in bcx's dtype."""
    K, D = taps.shape
    N, width = block.slots.shape[0], block.width
    history = _history(cells, block, K, bcx.dtype)
    rows = block.rows
    tokens = bcx[rows] if isinstance(rows, slice) else bcx.index_select(0, rows)
    B, C, x = tokens.split(D, dim=-1)
    values = torch.cat([history, (B * x).view(N, width, D)], dim=1)

    values32 = values.float()
    total = values32[:, K - 1 :] * taps[K - 1]
    for k in reversed(range(K - 1)):
        total.addcmul_(values32[:, k : k + width], taps[k])
    if bias is not None:
        total += bias
    conv = total.to(bcx.dtype).view(N * width, D)
    if isinstance(rows, slice):
        torch.mul(C, conv, out=out[rows])
    elif block.live is None:
        out.index_copy_(0, rows, C * conv)
    else:
        live, live_rows = block.live
        out.index_copy_(0, live_rows, (C * conv).index_select(0, live))
    return values


def _write_decodes(cells: torch.Tensor, values: torch.Tensor, plan: _Plan) -> None:
    """Columns 0 .. K-3+q of each decode become ``concat(history, values)[1:]``."""
    assert plan.decodes is not None
    slots = plan.decodes.slots
    new = values[:, 1:].to(cells.dtype)
    if plan.written is None:
        cells[:, : new.shape[1]].index_copy_(0, slots, new)
    else:
        sequence, column = plan.written
        cells[slots[sequence], column] = new[sequence, column]


def _write_tail(cells: torch.Tensor, bcx: torch.Tensor, values: torch.Tensor, tail: _Tail) -> None:
    """Columns 0 .. K-2 of each slot become the K - 1 values before the tail's end."""
    M, D = tail.slots.shape[0], cells.shape[2]
    B, _, x = bcx.index_select(0, tail.rows).split(D, dim=-1)
    new = (B * x).view(M, -1, D)
    if tail.in_block is not None:
        early = values.reshape(-1, D)[tail.source]
        new = torch.where(tail.in_block[:, :, None], early, new)
    cells[:, : new.shape[1]].index_copy_(0, tail.slots, new.to(cells.dtype))


def _make_plan(batch: ConvBatch, K: int, device: torch.device) -> _Plan:
    starts = batch.query_start.to(device=device, dtype=torch.int64)
    slots = batch.slots.to(device=device, dtype=torch.int64)
    lengths = starts[1:] - starts[:-1]
    alive = (slots != batch.null_slot) & (lengths > 0)
    first_prefill_row = int(starts[batch.num_decodes])
    plan = _Plan(first_prefill_row, int(starts[-1]), None, None, None, False, [], None)

    if not bool(alive.all()):
        token = torch.arange(plan.end, device=device)
        owner = torch.searchsorted(starts[1:], token, right=True)
        plan.dead_rows = token[~alive[owner]]
    fresh = ~batch.has_initial_state.to(device=device, dtype=torch.bool)
    split = batch.num_decodes
    if split:
        keep = alive[:split].nonzero().squeeze(1)
        _plan_decodes(plan, batch, K, slots, starts, lengths, fresh, keep)
    if batch.num_prefills:
        keep = alive[split:].nonzero().squeeze(1)
        _plan_prefills(plan, batch, K, slots, starts, lengths, fresh, keep)
    return plan


def _make_block(
    width: int,
    slots: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    fresh: torch.Tensor,
    columns: torch.Tensor | None,
) -> _Block:
    """A block over N sequences, given their slots, first rows, lengths and freshness, (N,) each."""
    offsets = torch.arange(width, device=slots.device)
    rows = (starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1)).view(-1)
    live = (offsets < lengths[:, None]).view(-1).nonzero().squeeze(1)
    return _Block(
        slots=slots,
        fresh=fresh[:, None, None] if bool(fresh.any()) else None,
        columns=columns,
        rows=rows,
        width=width,
        live=None if live.numel() == rows.numel() else (live, rows[live]),
    )


def _plan_decodes(
    plan: _Plan,
    batch: ConvBatch,
    K: int,
    slots: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    fresh: torch.Tensor,
    keep: torch.Tensor,
) -> None:
    if not keep.numel():
        return
    columns = None
    if batch.num_accepted is not None:
        first = batch.num_accepted.to(slots.device, torch.int64)[keep] - 1
        if bool(first.any()):
            columns = first[:, None] + torch.arange(K - 1, device=slots.device)
    q = lengths[keep]
    block = _make_block(int(q.max()), slots[keep], starts[keep], q, fresh[keep], columns)
    if block.live is not None:
        column = torch.arange(K - 2 + block.width, device=slots.device)
        sequence, column = (column < K - 2 + q[:, None]).nonzero(as_tuple=True)
        plan.written = (sequence, column)
    elif keep.numel() == batch.num_decodes:
        block.rows = slice(0, plan.first_prefill_row)
    plan.decodes = block


def _plan_prefills(
    plan: _Plan,
    batch: ConvBatch,
    K: int,
    slots: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    fresh: torch.Tensor,
    keep: torch.Tensor,
) -> None:
    if not keep.numel():
        return
    sequence = keep + batch.num_decodes
    slots, starts, q = slots[sequence], starts[sequence], lengths[sequence]
    plan.stream = int(q.max()) > K - 1
    plan.prefills = _make_block(K - 1, slots, starts, q, fresh[sequence], None)
    plan.tails.append(_make_tail(K, slots, starts, q, torch.arange(len(keep), device=slots.device)))
    if batch.checkpoint_offsets is None or batch.checkpoint_slots is None:
        return
    offsets = batch.checkpoint_offsets.to(slots.device, torch.int64)[keep]
    copies = batch.checkpoint_slots.to(slots.device, torch.int64)[keep]
    which = ((offsets > 0) & (copies != batch.null_slot)).nonzero().squeeze(1)
    if which.numel():
        plan.tails.append(_make_tail(K, copies[which], starts[which], offsets[which], which))


def _make_tail(
    K: int,
    slots: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    sequence: torch.Tensor,
) -> _Tail:
    """The K - 1 values that end ``ends`` tokens into the query; all arguments (M,).

    ``sequence`` is each sequence's index in the block of first tokens.
    """
    column = torch.arange(K - 1, device=slots.device)
    token = ends[:, None] - (K - 1) + column  # in the query; negative: history
    early = (ends < K - 1)[:, None].expand_as(token)
    position = torch.minimum(ends, torch.tensor(K - 1, device=slots.device))[:, None] + column
    return _Tail(
        slots=slots,
        rows=(starts[:, None] + token.clamp(min=0)).view(-1),
        in_block=early if bool(early.any()) else None,
        source=sequence[:, None] * 2 * (K - 1) + position,
    )
