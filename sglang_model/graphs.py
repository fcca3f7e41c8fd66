"""Decodes of how many requests SGLang captures as CUDA graphs, where the user doesn't say.

SGLang's default goes by the GPU's size: 256 requests on 80 GB, 32 on 48 GB. A request of LFM2-MoE takes little memory,
so many more run at once (683 of the 24B on an H100, 2,720 of the 8B), and what is beyond the largest graph is launched
kernel by kernel from Python. Wider graphs need no more memory than SGLang keeps anyway: outside its pools it leaves
1.5 MiB for each token of a piece of prompt, for the activations of any model; LFM2-MoE's take a twentieth of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lfm2_plugin.arch import Lfm2MoeArch

from .config import Lfm2MoeConfig
from .engine_api import (
    declare_resolution,
    get_device_memory_capacity,
    model_config_of,
    resolving_view,
    with_decode_graphs,
)
from .registration import SOURCE

LARGEST_GRAPH = 1024
"""Requests, as in vLLM (``vllm_model/options.py``)."""
GRAPH_BYTES = 2 * 2**20
"""What a graph costs for each request of the largest, by SGLang's own estimate."""
MARGIN = 2
"""So many times what is counted here must fit into what SGLang keeps outside its pools."""


def settle_graphs(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The step of SGLang's resolution that settles graphs and memory by the GPU's size, ours after it: the memory that
    SGLang divides stays as it is.
    """
    options = resolving_view(server_args)
    said = options.cuda_graph_config.decode
    open_to_us = said.max_bs is None and said.bs is None
    previous(server_args)
    if not open_to_us or not captures_plain_decodes(options):
        return
    model = model_config_of(server_args)
    memory = get_device_memory_capacity(options.device)  # MiB
    if memory is None or not isinstance(model.hf_config, Lfm2MoeConfig):
        return
    outside = memory * 2**20 * (1 - options.mem_fraction_static)
    largest = largest_graph(options, model.hf_config.arch, model.dtype.itemsize, outside)
    if largest > options.cuda_graph_config.decode.max_bs:
        graphs = with_decode_graphs(server_args, options.cuda_graph_config, largest)
        declare_resolution(server_args, SOURCE, cuda_graph_config=graphs)


def captures_plain_decodes(options: Any) -> bool:
    """Decodes of one token a request. A step of drafts has other sizes, and data-parallel attention other memory."""
    return (
        options.device != "cpu"
        and options.cuda_graph_config.decode.backend != "disabled"
        and options.disaggregation_mode != "prefill"
        and options.speculative_algorithm is None
        and not options.enable_dp_attention
    )


def largest_graph(options: Any, arch: Lfm2MoeArch, itemsize: int, outside: float) -> int:
    """Requests of the largest graph that is worth capturing, 0 where it wouldn't fit.

    Args:
        options: SGLang's.
        arch: the model's shape.
        itemsize: bytes of an activation.
        outside: bytes that SGLang leaves outside weights and pools.
    """
    requests = min(options.max_running_requests or LARGEST_GRAPH, LARGEST_GRAPH)
    tokens = options.chunked_prefill_size
    if tokens is None or tokens < 1:  # prompts are not cut
        tokens = options.max_prefill_tokens
    needed = tokens * activation_bytes(arch, itemsize) + requests * GRAPH_BYTES
    return requests if MARGIN * needed <= outside else 0


def activation_bytes(arch: Lfm2MoeArch, itemsize: int) -> int:
    """The most that a token's activations take at any time, without tensor parallelism.

    Beside its residual, input and output: in a dense layer gate and up and their product; in a layer with experts these
    and a result for each expert that it is sent to. A convolution's B, C and x are less.
    """
    D, F, dense = arch.hidden_size, arch.moe_intermediate_size, arch.intermediate_size
    return (3 * D + max(3 * dense, arch.num_experts_per_tok * (3 * F + D), 3 * D)) * itemsize
