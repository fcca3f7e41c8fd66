"""The experts that step in on a CPU, where adapters are allowed and experts spread over two ranks."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lfm2_plugin.ops.moe import moe
from tests.engine_common.adapters import adapted_cases, adapter
from tests.engine_common.references import assert_same, cases
from tests.tolerances import assert_within
from vllm_model.cpu_experts import AdaptedCpuExperts, CpuExpertsMethod

EXPERTS, HELD, WIDTH, INNER, TOKENS = 4, 2, 32, 16, 7


def of_rank(rank: int, w13: torch.Tensor, w2: torch.Tensor) -> tuple[CpuExpertsMethod, nn.Module]:
    """What one of two ranks has: vLLM's method with our kernel for adapters, and its share of the experts."""
    kernel = object.__new__(AdaptedCpuExperts)

    def apply(hidden_states, w1, w2, topk_weights, topk_ids, expert_map, **unused):
        """As vLLM's kernel: it hands the ids and the map to the experts."""
        out = torch.empty_like(hidden_states)
        ids = {"topk_weights": topk_weights, "topk_ids": topk_ids, "expert_map": expert_map}
        AdaptedCpuExperts.apply(kernel, out, hidden_states, w1, w2, **ids)
        return out

    method = object.__new__(CpuExpertsMethod)
    nn.Module.__init__(method)
    method.moe = SimpleNamespace(is_lora_enabled=True)
    method.moe_kernel = SimpleNamespace(apply=apply)
    method._forward_method = method.forward_native
    layer = nn.Module()
    share = slice(rank * HELD, (rank + 1) * HELD)
    layer.w13_weight, layer.w2_weight = w13[share], w2[share]
    layer.expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
    layer.expert_map[share] = torch.arange(HELD, dtype=torch.int32)
    layer.local_num_experts, layer.global_num_experts = HELD, EXPERTS
    layer.activation, layer.apply_router_weight_on_input = None, False
    return method, layer


def test_experts_without_adapters_on_them_are_found_on_their_rank():
    """``--lora-target-modules q_proj`` leaves the experts unwrapped, and their ids are the method's to map."""
    generator = torch.Generator().manual_seed(0)
    w13 = torch.randn(EXPERTS, 2 * INNER, WIDTH, generator=generator) / WIDTH**0.5
    w2 = torch.randn(EXPERTS, WIDTH, INNER, generator=generator) / INNER**0.5
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    weights, ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(2)
    parts = []
    for rank in range(EXPERTS // HELD):
        method, layer = of_rank(rank, w13, w2)
        parts.append(method.apply(layer, x, weights, ids, None, None))
    assert all(bool(part.any()) for part in parts)
    assert_within("moe", sum(parts), moe(x, w13, w2, weights, ids))


@pytest.mark.engine
@pytest.mark.matrix
def test_expert_parallel_with_adapters_on_attention_alone(run):
    folder, merged = adapter("alpha", ["q_proj"])
    asked, base = adapted_cases("alpha", merged), cases("alpha")[:40]
    steps = [
        {"prompts": [c.prompt for c in base]},
        {"prompts": [c.prompt for c in asked], "lora": str(folder)},
    ]
    engine = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj"]}
    engine |= {"tensor_parallel_size": 2, "enable_expert_parallel": True, "dtype": "float32"}
    plain, adapted = run("alpha", engine, steps, timeout=400)["steps"]
    assert_same(plain, base)
    assert_same(adapted, asked)
