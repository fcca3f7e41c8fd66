"""A layer's default way on a GPU, composed of an engine's kernels, held against the naive operator."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lfm2_plugin.conv_batch import ConvBatch
from lfm2_plugin.ops.short_conv import short_conv_naive
from tests.short_conv_steps import Case, same_bits
from tests.tolerances import assert_within


def checked(run: Callable[..., None], case: Case, step: tuple) -> str:
    """ "equal", or what isn't: outputs within the table's bound, states to the bit, in slots of no sequence too.

    The null slot is left out, which engines write as they like and never read. Of the rows of a sequence in it, which
    are read by nobody either, it is asked only that they were written.

    Args:
        run: ``run(case, bcx, weight, bias, state, batch, out)``, an engine's step.
        case: what the step consists of.
        step: of ``make_step``.
    """
    bcx, weight, bias, state, batch = step
    outs, states = [], []
    for way in (lambda *step: short_conv_naive(*step), lambda *step: run(case, *step)):
        after = state.clone(memory_format=torch.preserve_format)
        out = torch.full((bcx.shape[0], weight.shape[0]), float("nan"), dtype=bcx.dtype)
        way(bcx, weight, bias, after, batch, out)
        outs.append(out)
        states.append(after)
    try:
        compare(outs, states, batch)
    except AssertionError as error:
        return f"{type(error).__name__}: {error}"
    return "equal"


def compare(outs: list[torch.Tensor], states: list[torch.Tensor], batch: ConvBatch) -> None:
    """The naive operator's first.

    Raises:
        AssertionError: they differ.
    """
    (expected, out), (expected_state, state) = outs, states
    null = batch.slots == batch.null_slot
    lengths = batch.query_start.diff()
    answered = torch.ones(expected.shape[0], dtype=torch.bool)
    answered[: batch.num_tokens] = ~null.repeat_interleave(lengths)
    assert not out.isnan().any(), "rows were left unwritten"
    assert_within("short_conv", out[answered], expected[answered])
    differing = [
        slot
        for slot in range(state.shape[0])
        if slot != batch.null_slot and not same_bits(state[slot], expected_state[slot])
    ]
    assert not differing, (
        f"states differ in the slots {differing}; sequences are in {batch.slots.tolist()}"
    )
