"""Functions that a test runs on the model inside an engine's child (``{"op": "probe"}``).

Each takes the model and returns plain JSON. They look at what can't be seen from outside: buffers left
unwritten, the router's arithmetic, scales that a layer holds.
"""

import sys

import torch

POISON = float("nan")


def has_v2_runner(model) -> bool:
    """Whether this process has vLLM's runner V2, which is imported where it runs."""
    return "vllm.v1.worker.cpu.model_runner" in sys.modules


def conv_layers(model) -> list:
    return [layer.short_conv for layer in model.model.layers if hasattr(layer, "short_conv")]


def attention_layers(model) -> list:
    return [layer.self_attn for layer in model.model.layers if hasattr(layer, "self_attn")]


def expert_layers(model) -> list:
    return [x.feed_forward for x in model.model.layers if hasattr(x.feed_forward, "experts")]


def conv_without_metadata(model) -> dict:
    """Values that the operator leaves unwritten in a step without metadata, on a CPU and on a GPU.

    Called below the engine, on its layer: a poisoned output goes in, the poison left is counted.
    """
    from vllm.config import VllmConfig
    from vllm.forward_context import set_forward_context

    layer = conv_layers(model)[0]
    width = model.config.hidden_size
    takes_bcx = type(layer).__module__.startswith("vllm_model")
    left = {}
    with set_forward_context(None, VllmConfig()):
        for name in ("forward_native", "forward_cuda"):
            values = torch.randn(
                5, 3 * width if takes_bcx else width, dtype=layer.conv.weight.dtype
            )
            output = torch.full((5, width), POISON, dtype=values.dtype)
            getattr(layer, name)(hidden_states=values, output=output)
            left[name] = int(output.isnan().sum())
    return left


def kv_scales(model) -> list[list[float]]:
    """The key and value scale of every attention layer."""
    return [[float(a.attn._k_scale), float(a.attn._v_scale)] for a in attention_layers(model)]


def routing(model) -> dict:
    """Weights and expert ids of the first expert layer's router for logits given here.

    Row 0: ordinary scores. Row 1: scores around 1e-7, where the epsilon of the renormalisation shows.
    Row 2: a padding row.
    """
    from vllm.config import VllmConfig
    from vllm.forward_context import set_forward_context

    layer = expert_layers(model)[0]
    config = model.config
    logits = torch.randn(3, config.num_experts, generator=torch.Generator().manual_seed(0))
    logits[1] -= 16
    padding = torch.tensor([False, False, True])
    hidden = torch.zeros(3, config.hidden_size)
    router = layer.experts.router
    with set_forward_context(None, VllmConfig(), is_padding=padding):
        weights, ids = router.select_experts(hidden, logits)[:2]
    bias = getattr(layer, "expert_bias", None)
    bias = getattr(layer.gate, "e_score_correction_bias", None) if bias is None else bias
    return {
        "logits": logits.tolist(),
        "weights": weights.tolist(),
        "ids": ids.tolist(),
        "bias": bias.tolist(),
        "scaling": 1.0,
    }


def expert_bias(model) -> list[list[float]]:
    """The expert bias of every expert layer."""
    found = []
    for layer in expert_layers(model):
        bias = getattr(layer, "expert_bias", None)
        bias = getattr(layer.gate, "e_score_correction_bias", None) if bias is None else bias
        found.append(bias.tolist())
    return found
