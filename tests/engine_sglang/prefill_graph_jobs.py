"""SGLang's prefill graphs without a GPU, inside a test's scheduler: all of them but the recording of kernels.

A graph with gaps is segments, which replay kernels on buffers that stay where they are, and calls between them. Here
the segments run as they are written, with the tokens padded to a captured size as SGLang pads them.
"""

import torch
from sglang.srt.model_executor.model_runner_components.cuda_graph_setup import (
    has_hybrid_graph_handlers,
    index_attention_layers_by_global_id,
)
from sglang.srt.model_executor.model_runner_components.layer_setup import (
    compute_attention_and_moe_layers,
)
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
    BreakableCUDAGraph,
    BreakableCUDAGraphCapture,
    breakable_cuda_graph,
    enable_breakable_cuda_graph,
)
from sglang.srt.model_executor.runner_utils.forward_batch import set_forward_batch
from sglang.srt.model_executor.runner_utils.prefill_graph import prefill_graph_scope

from sglang_model.short_conv import Lfm2ShortConv

SIZES = (4, 64, 512, 4096)  # of captured graphs, tokens


def accepted(model) -> dict:
    """What SGLang asks of a model before it captures graphs of prefills with gaps."""
    body = model.model
    found = compute_attention_and_moe_layers(body)
    indexed, _ = index_attention_layers_by_global_id(
        found.attention_layers, found.mha_companion_layers, body
    )
    return {
        "handlers": has_hybrid_graph_handlers(
            attention_layers=indexed,
            moe_layers=found.moe_layers,
            start_layer=body.start_layer,
            end_layer=body.end_layer,
        ),
        "layers": [getattr(layer, "layer_id", None) for layer in indexed],
        "supported": body.supports_hybrid_prefill_graph,
    }


class Gaps:
    """Counts, on one model, the padding of its prefills and the convolutions that run in gaps."""

    def __init__(self, layers: int) -> None:
        self.layers = layers  # with a convolution
        self.steps = self.padding = self.convolutions = 0


def run_as_graphs(model) -> None:
    """From here on every prefill runs as in a replay."""
    body = model.model
    model.gaps = gaps = Gaps(sum(not layer.is_attention for layer in body.layers))
    plain = body.forward
    convolve = Lfm2ShortConv._convolve_in_gap

    def counted(self, bcx, mixed):
        gaps.convolutions += 1
        mixed.fill_(float("nan"))  # as fresh memory may be
        convolve.__get__(self).run_eager(bcx, mixed)

    Lfm2ShortConv._convolve_in_gap = counted

    def forward(input_ids, positions, batch, *others):
        if not batch.forward_mode.is_extend():
            return plain(input_ids, positions, batch, *others)
        tokens = input_ids.shape[0]
        padding = min(size for size in SIZES if size >= tokens) - tokens
        gaps.steps += 1
        gaps.padding += padding
        batch.global_num_token_non_padded_cpu = tokens
        with (
            set_forward_batch(batch),
            prefill_graph_scope(full_graph=False, raw_num_tokens=tokens),
            enable_breakable_cuda_graph(),
        ):
            padded = [torch.nn.functional.pad(x, (0, padding)) for x in (input_ids, positions)]
            return plain(*padded, batch, *others)[:tokens]

    body.forward = forward


def gaps(model) -> dict:
    """What was counted since."""
    return vars(model.gaps)


class _NothingRecorded(BreakableCUDAGraphCapture):
    """A capture whose segments are empty, since there is no GPU to record for."""

    def __enter__(self):
        self._token = breakable_cuda_graph._current_capture_var.set(self)
        return self

    def __exit__(self, *args):
        breakable_cuda_graph._current_capture_var.reset(self._token)
        return False

    def _begin_new_segment(self):
        pass

    def _end_current_segment(self):
        self.cuda_graph._segments.append(None)


def captured_and_replayed(model) -> dict:
    """One layer's gap, captured with other tokens than it is replayed with.

    Returns:
        of the gap: "captured" zeros, "replayed" as the operator gives it, "padding" zeros.
    """
    layer = next(x.conv for x in model.model.layers if not x.is_attention)
    seen = []

    def convolve(bcx, batch):
        seen.append((bcx.shape[0], batch))
        return bcx[:, : bcx.shape[1] // 3] * 2

    class Batch:
        global_num_token_non_padded_cpu = 5

    layer._convolve = convolve
    dim = layer.conv.weight.shape[1]
    buffer, mixed = torch.randn(8, 3 * dim), torch.full((8, dim), float("nan"))
    graph = BreakableCUDAGraph()
    with _NothingRecorded(graph):
        layer._convolve_in_gap(buffer, mixed)
    captured = bool((mixed == 0).all()) and not seen
    buffer.copy_(torch.randn(8, 3 * dim))
    batch = Batch()
    with set_forward_batch(batch):
        (gap,) = graph._break_fns
        gap()
    del layer._convolve
    return {
        "captured": captured,
        "replayed": torch.equal(mixed[:5], buffer[:5, :dim] * 2) and seen == [(5, batch)],
        "padding": bool((mixed[5:] == 0).all()),
    }
