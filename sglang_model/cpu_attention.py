"""Attention over SGLang's paged cache on a CPU: one call for many requests, in place of a loop over them.

SGLang's torch code runs one request at a time, and an extension of a cached prefix as if the prefix were asked again
(kv_len x kv_len work). Here the requests of a step are put into groups of like length, each padded to its longest and
run as one batch; what derives from lengths alone is made once a step and shared by the layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .engine_api import ForwardBatch, TorchNativeAttnBackend, uses_plain_attention, write_kv

PADDING = 1.3
"""A group may hold up to this many times its real keys: a call costs as much as some hundred keys of a request."""
CALL_KEYS = 256
MASK_ELEMENTS = 1 << 22
"""Largest mask of one call, query rows times keys. Larger ones fall out of the cache and are cut by query rows."""


@dataclass
class Group:
    """N requests of a step, padded to Q new tokens and L keys each.

    Attributes:
        queries: (N, Q) int64 rows of the step's tokens; padding repeats a request's last one.
        keys: (N, L) int64 places in the cache; padding repeats a place that is masked.
        first: (N,) int64 position of each request's first new token.
        lengths: (N,) int64 keys of each request.
        real: (M,) rows of the flattened (N, Q) that are tokens; None if all are.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    first: torch.Tensor
    lengths: torch.Tensor
    real: torch.Tensor | None

    @cached_property
    def decode_mask(self) -> torch.Tensor | None:
        """(N, 1, 1, L) bool: which keys each request's one query may see; None where all may see all."""
        if (self.lengths == self.keys.shape[1]).all():
            return None
        return _visible(self, slice(0, 1))

    @property
    def is_whole_prompt(self) -> bool:
        return self.queries.shape == self.keys.shape and self.queries.shape[0] == 1


class CpuAttentionBackend(TorchNativeAttnBackend):
    """Causal attention with grouped heads; anything else (windows, encoders) goes SGLang's way."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._groups: list[Group] = []

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Once a step: the groups."""
        super().init_forward_metadata(forward_batch)
        mode = forward_batch.forward_mode
        if mode.is_idle():
            self._groups = []
            return
        lengths = forward_batch.seq_lens.tolist()
        if mode.is_decode():
            new = [1] * len(lengths)
        elif mode.is_target_verify():
            drafts = forward_batch.spec_info.draft_token_num
            new = [drafts] * len(lengths)
            lengths = [length + drafts for length in lengths]
        else:
            new = forward_batch.extend_seq_lens.tolist()
        table = self.req_to_token_pool.req_to_token
        self._groups = make_groups(new, lengths, forward_batch.req_pool_indices, table)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(T, H * P) -> (T, H * P)."""
        if not uses_plain_attention(layer):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(S, H * P) -> (S, H * P)."""
        if not uses_plain_attention(layer):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        if save_kv_cache and k is not None:
            write_kv(self.token_to_kv_pool, layer, forward_batch.out_cache_loc, k, v)
        heads, kv_heads, dim = layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim
        query = q.view(-1, heads, dim)
        out = torch.zeros_like(query)  # rows that no request owns are padding
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id).view(-1, kv_heads * dim)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id).view(-1, kv_heads * dim)
        for group in self._groups:
            attend(query, keys, values, group, layer.scaling, out)
        return out.view(q.shape[0], heads * dim)


def make_groups(
    new: list[int],
    lengths: list[int],
    req_pool_indices: torch.Tensor,
    table: torch.Tensor,
) -> list[Group]:
    """Sort a step's requests into groups of like length.

    Args:
        new: tokens of each request in this step, in the order of the flat batch.
        lengths: keys of each request, the new tokens' included.
        req_pool_indices: (S,) rows of the table.
        table: (requests, longest context) places in the cache.
    """
    starts = [0]
    for count in new[:-1]:
        starts.append(starts[-1] + count)
    alive = [i for i, count in enumerate(new) if count]
    order = sorted(alive, key=lambda i: (new[i], lengths[i]))
    groups: list[list[int]] = []
    for index in order:
        if groups and _fits(groups[-1], index, new, lengths):
            groups[-1].append(index)
        else:
            groups.append([index])
    return [
        _make_group(members, starts, new, lengths, req_pool_indices, table) for members in groups
    ]


def _fits(members: list[int], index: int, new: list[int], lengths: list[int]) -> bool:
    """Whether padding the group for one more request costs less than a call of its own."""
    together = [*members, index]
    widest = max(new[i] for i in together)
    longest = max(lengths[i] for i in together)
    if len(together) * widest * longest > MASK_ELEMENTS:
        return False
    real = sum(new[i] * lengths[i] for i in together)
    padded = len(together) * widest * longest
    return padded <= PADDING * real + CALL_KEYS * widest


def _make_group(
    members: list[int],
    starts: list[int],
    new: list[int],
    lengths: list[int],
    req_pool_indices: torch.Tensor,
    table: torch.Tensor,
) -> Group:
    count = torch.tensor([new[i] for i in members])
    length = torch.tensor([lengths[i] for i in members])
    start = torch.tensor([starts[i] for i in members])
    column = torch.arange(int(count.max()))
    queries = start[:, None] + torch.minimum(column, count[:, None] - 1)
    rows = req_pool_indices[torch.tensor(members)].long()
    column_of_key = torch.arange(int(length.max()))
    keys = table[rows[:, None], torch.minimum(column_of_key, length[:, None] - 1)].long()
    is_token = (column < count[:, None]).view(-1)
    return Group(
        queries=queries,
        keys=keys,
        first=length - count,
        lengths=length,
        real=None if bool(is_token.all()) else is_token.nonzero().squeeze(1),
    )


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: Group,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attention of one group's requests, written to their rows of ``out``.

    Args:
        query: (T, H, P).
        keys: (places, G * P), any float dtype.
        values: like keys.
        group: the requests, and the places of their keys.
        scale: of the scores.
        out: (T, H, P) like query.
    """
    N, Q = group.queries.shape
    H, P = query.shape[1:]
    G = keys.shape[1] // P
    L = group.keys.shape[1]
    places = group.keys.view(-1)
    k = keys.index_select(0, places).to(query.dtype).view(N, L, G, P).transpose(1, 2)
    v = values.index_select(0, places).to(query.dtype).view(N, L, G, P).transpose(1, 2)
    if Q == 1:
        # The query heads of a kv head as so many queries: no copy of the keys for each of them.
        q = query[group.queries[:, 0]].view(N, G, H // G, P)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=group.decode_mask, scale=scale)
        out[group.queries[:, 0]] = mixed.reshape(N, H, P)
        return
    q = query[group.queries.view(-1)].view(N, Q, H, P).transpose(1, 2)
    if group.is_whole_prompt:
        mixed = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        ).transpose(1, 2)
    else:
        mixed = query.new_empty(N, Q, H, P)
        step = max(1, MASK_ELEMENTS // (N * L))
        for start in range(0, Q, step):
            piece = slice(start, min(start + step, Q))
            mixed[:, piece] = scaled_dot_product_attention(
                q[:, :, piece],
                k,
                v,
                attn_mask=_visible(group, piece),
                scale=scale,
                enable_gqa=True,
            ).transpose(1, 2)
    flat, rows = mixed.reshape(N * Q, H, P), group.queries.view(-1)
    if group.real is not None:
        flat, rows = flat[group.real], rows[group.real]
    out[rows] = flat


def _visible(group: Group, piece: slice) -> torch.Tensor:
    """(N, 1, piece, L) bool: which keys the queries of a piece may see."""
    position = group.first[:, None] + torch.arange(piece.start, piece.stop)
    key = torch.arange(group.keys.shape[1])
    last = torch.minimum(position, group.lengths[:, None] - 1)
    return (key <= last[:, :, None])[:, None]
