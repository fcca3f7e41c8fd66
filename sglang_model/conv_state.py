"""The states of the short convolutions in SGLang's pool: a step's metadata, and snapshots for the prefix cache.

SGLang's prefix cache keeps states in one of two ways. With "no_buffer" it takes a request's running state when the
request has ended or left its prompt, which forbids the overlap scheduler, since the next step may have moved the state on
by then. With "extra_buffer" the model itself copies its states into slots that the scheduler names (it "tracks" them):
after a piece of prompt at a place on a grid, while decoding every so many tokens. That is what is done here.
"""

from __future__ import annotations

from typing import Any

import torch

from lfm2_plugin.conv_batch import ConvBatch
from lfm2_plugin.ops.short_conv import short_conv

from . import gpu_conv
from .engine_api import ForwardBatch, ShortConvAttnBackend, conv_batch_from, tracked_prefills


class ConvStateBackend(ShortConvAttnBackend):
    """SGLang's state plumbing, with our operator on it and the snapshots that SGLang's own leaves out."""

    needs_extend_host_mirrors = False  # copies on the host, for models that loop over sequences

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._batch: ConvBatch | None = None
        self._tracked: torch.Tensor | None = None  # rows of this decode step whose state is copied
        self._last_layer = max(self.req_to_token_pool.mamba_map)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Once a step, before any layer."""
        super().init_forward_metadata(forward_batch)
        mode = forward_batch.forward_mode
        if mode.is_idle() or torch.device(self.device).type != "cpu":
            self._batch = self._tracked = None
            return
        self._batch = conv_batch_from(
            self._cache_indices, self.forward_metadata.query_start_loc, forward_batch
        )
        self._tracked = None
        if mode.is_decode() and forward_batch.mamba_track_mask is not None:
            rows = forward_batch.mamba_track_mask.nonzero().squeeze(1)
            self._tracked = rows if rows.numel() else None

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
        if bcx.device.type != "cpu":
            return self._convolve_on_gpu(layer_id, cache, bcx, weight, bias, forward_batch)
        out = short_conv(bcx, weight, bias, cache.conv[0], self._batch)
        if self._tracked is not None and layer_id == self._last_layer:
            self._track_decodes(forward_batch)
        return out

    def _track_decodes(self, forward_batch: ForwardBatch) -> None:
        """Copy the states of all layers, all final by now, to the slots that the scheduler named."""
        pool = self.req_to_token_pool.mamba_pool.mamba_cache.conv[0]  # (layers, slots, D, K-1)
        sources = self._cache_indices[self._tracked]
        targets = forward_batch.mamba_track_indices[self._tracked]
        pool[:, targets] = pool[:, sources]

    def _convolve_on_gpu(
        self,
        layer_id: int,
        cache: Any,
        bcx: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """As :meth:`convolve`, of the engine's kernels; decodes may run inside a captured graph."""
        state, slots = cache.conv[0], self._cache_indices
        if forward_batch.forward_mode.is_decode():
            out = gpu_conv.decode(bcx, weight, bias, state, slots)
            # The engine's own copy of snapshots, one launch for all layers after the last of them.
            self._track_mamba_state_decode(forward_batch, state, cache.temporal, slots, layer_id)
            return out
        return gpu_conv.extend(
            bcx,
            weight,
            bias,
            state,
            slots,
            self.forward_metadata.query_start_loc,
            self._has_initial_state,
            tracked_prefills(forward_batch),
        )
