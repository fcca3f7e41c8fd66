"""Functions that a test runs on the model inside an engine's scheduler (``{"op": "probe"}``).

Each takes the model, ours or the built-in, and returns plain JSON.
"""

import torch


def head_is_the_embedding(model) -> bool:
    """Whether head and embedding are one tensor in memory."""
    return model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def drafter_methods(model) -> dict:
    """Which of the methods the model has that SGLang calls for a drafter."""
    names = ("get_embed_and_head", "set_embed_and_head", "set_eagle3_layers_to_capture")
    return {name: callable(getattr(model, name, None)) for name in names}


def routing(model) -> dict:
    """Weights and expert ids of the first expert layer's router for logits given here.

    Row 0: ordinary scores. Row 1: scores around 1e-7, where the epsilon of the renormalisation shows.
    """
    layer = next(x.feed_forward for x in model.model.layers if hasattr(x.feed_forward, "topk"))
    config = model.config
    logits = torch.randn(2, config.num_experts, generator=torch.Generator().manual_seed(0))
    logits[1] -= 16
    found = layer.topk(torch.zeros(2, config.hidden_size), logits)
    return {
        "logits": logits.tolist(),
        "weights": found.topk_weights.tolist(),
        "ids": found.topk_ids.tolist(),
        "bias": layer.expert_bias.tolist(),
    }


def expert_bias(model) -> list[list[float]]:
    """The expert bias of every expert layer."""
    layers = [x.feed_forward for x in model.model.layers]
    return [layer.expert_bias.tolist() for layer in layers if hasattr(layer, "topk")]
