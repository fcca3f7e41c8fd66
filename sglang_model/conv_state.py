"""The states of the short convolutions in SGLang's pool: a step's metadata, and snapshots for the prefix cache.

SGLang's prefix cache keeps states in one of two ways. With "no_buffer" it takes a request's running state when the
request has ended or left its prompt, which forbids the overlap scheduler, since the next step may have moved the
state on by then. With "extra_buffer" the model itself copies its states into slots that the scheduler names (it
"tracks" them): after a piece of prompt at a place on a grid, while decoding every so many tokens. That is what is
done here.

Drafts move no state on. Each leaves the state that it would be in the pool's "intermediate windows", and when SGLang
has decided which stand, the last of them is copied to the slot, and to a snapshot's where one is due.
"""

from __future__ import annotations

from typing import Any

import torch

from lfm2_plugin.conv_batch import ConvBatch
from lfm2_plugin.dispatch import is_forced
from lfm2_plugin.ops.short_conv import short_conv
from lfm2_plugin.ops.short_conv_drafts import branches, chain, short_conv_drafts, tree

from . import gpu_conv
from .engine_api import (
    ForwardBatch,
    ShortConvAttnBackend,
    ShortConvHybridAttnBackend,
    conv_batch_from,
    tracked_prefills,
)


class ConvStateBackend(ShortConvAttnBackend):
    """SGLang's state plumbing, with our operator on it and the snapshots that SGLang's own leaves out."""

    needs_extend_host_mirrors = False  # copies on the host, for models that loop over sequences

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        # On a GPU the engine's kernels run, until ours are asked for: none has run them yet.
        self._on_cpu = torch.device(self.device).type == "cpu"
        self._ours = self._on_cpu or is_forced()
        self._batch: ConvBatch | None = None
        self._always = torch.ones(0, dtype=torch.bool, device=self.device)
        self._tracked: torch.Tensor | None = None  # rows of this decode step whose state is copied
        self._seen: torch.Tensor | None = None  # what the drafts of this step see
        self._first_layer = min(self.req_to_token_pool.mamba_map)
        self._last_layer = max(self.req_to_token_pool.mamba_map)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Before the first capture: what captured decodes of up to ``max_bs`` sequences read."""
        super().init_cuda_graph_state(max_bs, max_num_tokens)
        self._always = torch.ones(max_bs, dtype=torch.bool, device=self.device)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Once a step, before any layer."""
        super().init_forward_metadata(forward_batch)
        self._batch = self._make_batch(forward_batch)
        self._tracked = None
        if (
            self._on_cpu
            and forward_batch.forward_mode.is_decode()
            and forward_batch.mamba_track_mask is not None
        ):
            rows = forward_batch.mamba_track_mask.nonzero().squeeze(1)
            self._tracked = rows if rows.numel() else None

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Before a decode or a verification of drafts is captured, and before each replay."""
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        decodes = forward_batch.forward_mode.is_decode()
        self._batch, self._tracked = self._make_batch(forward_batch) if decodes else None, None

    def _make_batch(self, forward_batch: ForwardBatch) -> ConvBatch | None:
        """The step as our operator sees it; None where it doesn't run."""
        mode = forward_batch.forward_mode
        if not self._ours or mode.is_idle() or mode.is_target_verify():
            return None
        slots = self._cache_indices
        always = self._always[: slots.shape[0]]
        if always.shape != slots.shape:  # more than any graph holds
            always = torch.ones(slots.shape[0], dtype=torch.bool, device=self.device)
        return conv_batch_from(slots, self.forward_metadata.query_start_loc, forward_batch, always)

    def convolve(
        self,
        layer_id: int,
        bcx: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """Convolve a layer's B, C, x (T, 3D) into (T, D), and move the layer's states on."""
        cache = self.req_to_token_pool.mamba2_layer_cache(layer_id)
        if forward_batch.forward_mode.is_target_verify():
            if layer_id == self._first_layer:
                self._seen = self._make_seen(bcx.shape[0], weight.shape[1], forward_batch)
            return self._convolve_drafts(cache, bcx, weight, bias)
        state = cache.conv[0]
        if self._ours:
            out = short_conv(bcx, weight, bias, state, self._batch)
        else:
            out = self._convolve_by_engine(state, bcx, weight, bias, forward_batch)
        if self._tracked is not None and layer_id == self._last_layer:
            self._track_decodes(forward_batch)
        if not self._on_cpu and forward_batch.forward_mode.is_decode():
            # The engine's own copy of snapshots, one launch for all layers after the last of them.
            slots = self._cache_indices
            self._track_mamba_state_decode(forward_batch, state, cache.temporal, slots, layer_id)
        return out

    def _track_decodes(self, forward_batch: ForwardBatch) -> None:
        """Copy the states of all layers, all final by now, to the slots that the scheduler named."""
        pool = self.req_to_token_pool.mamba_pool.mamba_cache.conv[0]  # (layers, slots, D, K-1)
        sources = self._cache_indices[self._tracked]
        targets = forward_batch.mamba_track_indices[self._tracked]
        pool[:, targets] = pool[:, sources]

    def _make_seen(self, tokens: int, width: int, forward_batch: ForwardBatch) -> torch.Tensor:
        """What each draft sees (S, q, K): its branch of the tree, or the drafts before it where SGLang gives no tree.

        Made in the first layer, not before the step, so that a captured graph makes it anew each time.
        """
        if forward_batch.spec_info.ragged_verify_layout is not None:
            raise ValueError(
                "LFM2-MoE's convolutions can't be served with SGLANG_RAGGED_VERIFY_MODE=compact; set it to static."
            )
        sequences = self._cache_indices.shape[0]
        links = self.forward_metadata
        if links.retrieve_next_token is None:
            before = chain(sequences, tokens // sequences, self._cache_indices.device)
        else:
            before = tree(links.retrieve_next_token.long(), links.retrieve_next_sibling.long())
        return branches(before, width)

    def _convolve_drafts(
        self, cache: Any, bcx: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """As :meth:`convolve` on S * q drafts, whose states go to the first S rows of the windows."""
        assert self._seen is not None  # the first layer has made it
        state, windows = cache.conv[0], cache.intermediate_conv_window[0]
        return short_conv_drafts(bcx, weight, bias, state, self._cache_indices, self._seen, windows)

    def keep_drafts(
        self,
        last: torch.Tensor,
        snapshot_slots: torch.Tensor | None,
        snapshot_drafts: torch.Tensor | None,
    ) -> None:
        """Move the states on to the last draft that stands, all layers at once.

        Args:
            last: (S,) which draft it is.
            snapshot_slots: (S,) where a snapshot goes; None if none are kept.
            snapshot_drafts: (S,) after which draft it is taken, -1 for none; None if none are kept.
        """
        cache = self.req_to_token_pool.get_speculative_mamba2_params_all_layers()
        pool, windows = cache.conv[0], cache.intermediate_conv_window[0]  # (layers, slots, ...)
        rows = torch.arange(last.shape[0], device=last.device)
        pool[:, self._cache_indices] = windows[:, rows, last.long()]
        if snapshot_slots is not None and snapshot_drafts is not None:
            due = (snapshot_drafts >= 0) & (snapshot_slots >= 0)
            pool[:, snapshot_slots[due]] = windows[:, rows[due], snapshot_drafts[due].long()]

    def _convolve_by_engine(
        self,
        state: torch.Tensor,
        bcx: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """As :meth:`convolve`, of the engine's kernels for GPUs; decodes may run inside a captured graph."""
        if forward_batch.forward_mode.is_decode():
            return gpu_conv.decode(bcx, weight, bias, state, self._cache_indices)
        return gpu_conv.extend(
            bcx,
            weight,
            bias,
            state,
            self._cache_indices,
            self.forward_metadata.query_start_loc,
            self._has_initial_state,
            tracked_prefills(forward_batch),
        )


class ConvHybridBackend(ShortConvHybridAttnBackend):
    """SGLang's pair of the attention backend and the backend above."""

    short_conv_backend: ConvStateBackend

    def update_mamba_state_after_mtp_verify(
        self,
        last_correct_step_indices: torch.Tensor,
        mamba_track_indices: torch.Tensor | None,
        mamba_steps_to_track: torch.Tensor | None,
        model: Any,
        req_pool_indices: torch.Tensor | None = None,
    ) -> None:
        """SGLang has decided which drafts stand; its own copy of their states is a Triton kernel."""
        if last_correct_step_indices.device.type == "cpu":
            self.short_conv_backend.keep_drafts(
                last_correct_step_indices, mamba_track_indices, mamba_steps_to_track
            )
            return
        super().update_mamba_state_after_mtp_verify(
            last_correct_step_indices,
            mamba_track_indices,
            mamba_steps_to_track,
            model,
            req_pool_indices,
        )
