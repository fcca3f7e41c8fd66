"""What one engine step looks like to the short convolution, whatever the engine.

An engine hands its model a flat batch of tokens in which many sequences lie end to end: some decode one token (or a
few, when drafts are verified), some prefill a piece of a prompt. :class:`ConvBatch` is all that the convolution has to
know of it; each engine package has one function that fills it (``engine_api.py``), and ``docs/contracts.md`` says from
what.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class ConvBatch:
    """The sequences of one step: decodes first, then prefills; S = num_decodes + num_prefills.

    Attributes:
        slots: (S,) int, the state slot of each sequence.
        query_start: (S + 1,) int, where each sequence's tokens start in the flat batch. Rows from ``query_start[S]``
            on are padding: their output is zero.
        has_initial_state: (S,) bool. False: the values before the query are zeros, whatever the slot holds.
        num_decodes: sequences that go on from their state by ``1 .. max_decode_len`` tokens.
        num_decode_tokens: their tokens, which come first in the batch.
        num_prefills: sequences that read a piece of their prompt.
        num_prefill_tokens: their tokens, which follow.
        max_decode_len: the longest decode query; 1 unless drafts are verified.
        num_accepted: (num_decodes,) int or None. How many tokens of the previous decode query were kept (at least 1):
            the history of the sequence starts at state column ``num_accepted - 1``. None means 1 everywhere.
        checkpoint_offsets: (num_prefills,) int or None. After this many tokens of its query a prefill's state is also
            written to its checkpoint slot; 0 means no checkpoint for that sequence.
        checkpoint_slots: (num_prefills,) int or None, the slots for these copies.
        null_slot: a sequence in this slot is padding: zeros out, no state touched.
        indices: index tensors that an implementation derives from the fields above, kept so that they are made once a
            step and not once a layer. Owned by the implementations of ``ops/short_conv``.
    """

    slots: torch.Tensor
    query_start: torch.Tensor
    has_initial_state: torch.Tensor
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    num_prefill_tokens: int
    max_decode_len: int = 1
    num_accepted: torch.Tensor | None = None
    checkpoint_offsets: torch.Tensor | None = None
    checkpoint_slots: torch.Tensor | None = None
    null_slot: int = -1
    indices: dict[str, object] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_sequences(self) -> int:
        return self.num_decodes + self.num_prefills

    @property
    def num_tokens(self) -> int:
        return self.num_decode_tokens + self.num_prefill_tokens
