"""Packed weights made plain, below the engine: with vLLM's own packing, what comes back is what was packed."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vllm_model.cpu_weights import PackedWeights
from vllm_model.engine_api import CPUUnquantizedExperts

EXPERTS, HIDDEN = 3, 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 48])  # vLLM's kernel pads the second to 64
def test_experts_come_back_bit_for_bit(width, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (EXPERTS, 2 * width, HIDDEN), (EXPERTS, HIDDEN, width)
    plain = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    kernel = object.__new__(CPUUnquantizedExperts)
    kernel.moe_config = SimpleNamespace(intermediate_size_per_partition=width, activation=None)
    layer = nn.Module()
    layer.hidden_size, layer.intermediate_size_per_partition = HIDDEN, width
    layer.quant_method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=kernel))
    layer.w13_weight, layer.w2_weight = (
        nn.Parameter(w.clone(), requires_grad=False) for w in plain
    )
    kernel.process_weights_after_loading(layer)
    packed = layer.w13_weight.data
    assert packed.shape[1] == 128
    assert not torch.equal(packed[:, : 2 * width], plain[0])
    PackedWeights(nn.Module())._unpack_experts(layer)
    assert torch.equal(layer.w13_weight, plain[0])
    assert torch.equal(layer.w2_weight, plain[1])
