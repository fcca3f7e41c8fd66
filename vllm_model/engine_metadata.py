"""The translation of vLLM's metadata of a step; ``docs/contracts.md`` has the table."""

from __future__ import annotations

import torch

from lfm2_plugin.conv_batch import ConvBatch

from .engine_api import (
    NULL_BLOCK_ID,
    CommonAttentionMetadata,
    MambaPrefillCheckpointMetadata,
    ShortConvAttentionMetadata,
)


def conv_batch_from(
    metadata: ShortConvAttentionMetadata,
    common: CommonAttentionMetadata,
    checkpoint: MambaPrefillCheckpointMetadata | None,
    always: torch.Tensor,
    max_decode_len: int,
) -> ConvBatch:
    """vLLM's metadata of a step as a :class:`ConvBatch`; ``docs/contracts.md`` has the table.

    Of a step that only decodes, every tensor is a view of what vLLM's runner, its builder or ours keep from step to
    step, so that a CUDA graph which captured one reads the next one's values.

    Args:
        metadata: the conv metadata: who decodes, who prefills, and each one's block. vLLM puts decodes first.
        common: the step's metadata shared by all layers, for the query starts of all sequences.
        checkpoint: where prefills leave a copy of their state on the way, if anywhere.
        always: True for each of at least as many sequences as decode; never changed.
        max_decode_len: the most tokens that a decode may have.
    """
    num_decodes, num_prefills = metadata.num_decodes, metadata.num_prefills
    slots, has_state = [], []
    if num_decodes or not num_prefills:
        # Column 0 is the running block. The columns after it are for states that can't be cut to a shorter history;
        # ours can, by its offset.
        slots.append(metadata.state_indices_tensor_d[:num_decodes, 0])
        has_state.append(always[:num_decodes])
    if num_prefills:
        slots.append(metadata.state_indices_tensor_p)
        has_state.append(metadata.has_initial_states_p)
    accepted = metadata.num_accepted_tokens if num_decodes else None
    return ConvBatch(
        slots=slots[0] if len(slots) == 1 else torch.cat(slots),
        query_start=common.query_start_loc[: num_decodes + num_prefills + 1],
        has_initial_state=has_state[0] if len(has_state) == 1 else torch.cat(has_state),
        num_decodes=num_decodes,
        num_decode_tokens=metadata.num_decode_tokens,
        num_prefills=num_prefills,
        num_prefill_tokens=metadata.num_prefill_tokens,
        max_decode_len=1 if accepted is None else max_decode_len,
        num_accepted=None if accepted is None else accepted[:num_decodes],
        checkpoint_offsets=None if checkpoint is None else checkpoint.checkpoint_offsets,
        checkpoint_slots=None if checkpoint is None else checkpoint.state_indices,
        null_slot=NULL_BLOCK_ID,
    )
