"""What fits into a device: weights, keys and values, and conv state, before anything is started.

The engines hand out cache memory in blocks: ``block_size`` tokens of keys and values of all
attention layers, or the conv states of one sequence in the same room. What a request costs is
therefore counted in blocks here as well. :class:`Paging` holds the rules of one engine; those of
vLLM were checked against its own planner (docs/memory.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lfm2_plugin.arch import Lfm2MoeArch

GIB = 2**30
_FLOAT32_BYTES = 4


class DoesNotFit(ValueError):
    """The weights leave no room for a single request."""


@dataclass(frozen=True)
class Paging:
    """How an engine cuts cache memory.

    Attributes:
        block_size: tokens in a block; grows in whole multiples until a conv page fits into an
            attention page.
        kv_dtype: of keys and values.
        state_dtype: of the conv state.
        drafts: speculative tokens a step; each adds one value a channel to the state.
        prefix_cache: keep states for later requests (vLLM's "align" mode).
        reserved_blocks: blocks that the engine keeps for itself (vLLM: the null block).
    """

    block_size: int = 16
    kv_dtype: torch.dtype = torch.bfloat16
    state_dtype: torch.dtype = torch.bfloat16
    drafts: int = 0
    prefix_cache: bool = True
    reserved_blocks: int = 1

    @property
    def conv_blocks(self) -> int:
        """Blocks that a request claims for conv state at most.

        One for the running state. With the prefix cache also the state that the request starts from
        and a copy at the last block boundary of its prompt, for the next request to start from.
        """
        return 3 if self.prefix_cache else 1


@dataclass(frozen=True)
class Capacity:
    """What fits; all sizes in bytes.

    Attributes:
        weight_bytes: the model's weights.
        cache_bytes: what is left for the cache.
        block_size: tokens in a block after growing, see :class:`Paging`.
        block_bytes: one block.
        num_blocks: blocks in the cache.
        conv_bytes: conv state of one request, as it is claimed.
        request_bytes: keys, values and conv state of one request.
        requests: requests of the given length that fit at once.
    """

    weight_bytes: int
    cache_bytes: int
    block_size: int
    block_bytes: int
    num_blocks: int
    conv_bytes: int
    request_bytes: int
    requests: int


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def parameter_counts(arch: Lfm2MoeArch) -> tuple[int, int]:
    """Number of weights in the model's dtype, and of those always in float32 (the expert
    biases).
    """
    hidden, heads = arch.hidden_size, arch.num_heads * arch.head_dim
    kv = arch.num_kv_heads * arch.head_dim
    bias = int(arch.conv_bias)
    conv = hidden * (4 * hidden + arch.conv_width) + bias * 5 * hidden
    attention = hidden * (2 * heads + 2 * kv) + 2 * arch.head_dim
    dense = 3 * hidden * arch.intermediate_size
    experts = arch.num_experts * hidden * (3 * arch.moe_intermediate_size + 1)
    num_moe = len(arch.moe_layers)
    embeddings = (1 if arch.tie_word_embeddings else 2) * arch.vocab_size * hidden
    total = (
        embeddings
        + hidden
        + arch.num_layers * 2 * hidden
        + len(arch.conv_layers) * conv
        + len(arch.attention_layers) * attention
        + (arch.num_layers - num_moe) * dense
        + num_moe * experts
    )
    return total, num_moe * arch.num_experts * int(arch.use_expert_bias)


def weight_bytes(arch: Lfm2MoeArch, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the weights when all but the expert biases have ``dtype``."""
    weights, biases = parameter_counts(arch)
    return weights * dtype.itemsize + biases * _FLOAT32_BYTES


def conv_page_bytes(arch: Lfm2MoeArch, paging: Paging) -> int:
    """Bytes of the conv states that share one page, as many as there are conv layers to an
    attention layer.
    """
    pages = max(len(arch.attention_layers), 1)
    together = _ceil_div(len(arch.conv_layers), pages)
    length = arch.state_len + paging.drafts
    return together * length * arch.hidden_size * paging.state_dtype.itemsize


def grown_block_size(arch: Lfm2MoeArch, paging: Paging) -> int:
    """Tokens in a block, so many times ``paging.block_size`` that a conv page fits into an
    attention page.

    Raises:
        ValueError: the model has no attention layer to share blocks with.
    """
    if not arch.attention_layers:
        raise ValueError("a model without attention layers has no attention blocks to plan with")
    token = 2 * arch.num_kv_heads * arch.head_dim * paging.kv_dtype.itemsize
    page = paging.block_size * token
    return paging.block_size * _ceil_div(conv_page_bytes(arch, paging), page)


def capacity(
    arch: Lfm2MoeArch,
    device_bytes: float,
    tokens: int,
    paging: Paging | None = None,
    utilisation: float = 0.92,
    reserve_bytes: float = 3 * GIB,
    weights: int | None = None,
) -> Capacity:
    """How many requests of ``tokens`` (prompt and answer) fit at once.

    Args:
        arch: the model.
        device_bytes: memory of the device.
        tokens: length of every request.
        paging: the engine's rules; vLLM's defaults on a GPU when absent.
        utilisation: share of the memory that the engine may use.
        reserve_bytes: for activations and captured graphs; an assumption, measure yours.
        weights: bytes of the weights where they are not bfloat16.

    Raises:
        DoesNotFit: not one request fits; says how much is missing.
        ValueError: ``tokens`` is not positive.
    """
    if tokens < 1:
        raise ValueError(f"a request has at least 1 token, not {tokens}")
    paging = paging or Paging()
    weights = weight_bytes(arch) if weights is None else weights
    cache = int(device_bytes * utilisation - reserve_bytes) - weights
    block_size = grown_block_size(arch, paging)
    block = block_size * arch.kv_bytes_per_token(paging.kv_dtype)
    per_request = _ceil_div(tokens, block_size) + paging.conv_blocks
    blocks = max(cache, 0) // block
    requests = max(blocks - paging.reserved_blocks, 0) // per_request
    if not requests:
        need = weights + block * (per_request + paging.reserved_blocks)
        raise DoesNotFit(
            f"{(need + reserve_bytes) / GIB:.1f} GiB are needed for one request of {tokens} tokens, "
            f"{device_bytes * utilisation / GIB:.1f} GiB may be used: take a smaller or quantised model, "
            "shorter requests, or a larger device"
        )
    return Capacity(
        weight_bytes=weights,
        cache_bytes=cache,
        block_size=block_size,
        block_bytes=block,
        num_blocks=blocks,
        conv_bytes=paging.conv_blocks * block,
        request_bytes=per_request * block,
        requests=requests,
    )


def longest_request(
    arch: Lfm2MoeArch,
    device_bytes: float,
    concurrency: int,
    paging: Paging | None = None,
    utilisation: float = 0.92,
    reserve_bytes: float = 3 * GIB,
    weights: int | None = None,
) -> int:
    """The longest context, in tokens, that ``concurrency`` requests can have at once; at most the
    model's own.

    Raises:
        DoesNotFit: not even one block each fits.
        ValueError: ``concurrency`` is not positive.
    """
    if concurrency < 1:
        raise ValueError(f"the concurrency is at least 1, not {concurrency}")
    paging = paging or Paging()
    one = capacity(arch, device_bytes, 1, paging, utilisation, reserve_bytes, weights)
    each = (one.num_blocks - paging.reserved_blocks) // concurrency - paging.conv_blocks
    if each < 1:
        raise DoesNotFit(
            f"{concurrency} requests at once leave no room for tokens: at most {one.requests} fit"
        )
    return min(each * one.block_size, arch.max_position_embeddings)
