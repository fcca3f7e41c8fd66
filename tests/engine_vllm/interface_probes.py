"""Functions run on the model inside an engine's child: what vLLM sees of it through its interfaces."""

import torch


def interfaces(model) -> dict:
    """The capabilities by vLLM's own tests of a model."""
    from vllm.model_executor.models import interfaces as known

    names = (
        "supports_pp",
        "supports_lora",
        "is_hybrid",
        "has_inner_state",
        "is_mixture_of_experts",
    )
    names += ("supports_eagle", "supports_eagle3")
    found = {name: bool(getattr(known, name)(model)) for name in names}
    sizes = ("num_moe_layers", "num_logical_experts", "num_physical_experts", "num_shared_experts")
    return found | {name: getattr(model, name) for name in sizes}


def auxiliary_hidden_states(model) -> dict:
    """What EAGLE3 gets for layers 0, 1 and 2, beside what the layers really saw, as largest differences."""
    from vllm.forward_context import set_forward_context

    inner = model.model
    seen = {}

    def note(index):
        def hook(module, args):
            _, hidden, residual = args
            seen[index] = hidden.clone() if residual is None else hidden + residual

        return hook

    hooks = [
        layer.register_forward_pre_hook(note(index)) for index, layer in enumerate(inner.layers)
    ]
    model.set_aux_hidden_state_layers((0, 1, 2))
    ids, positions = torch.arange(8, 14), torch.arange(6)
    with set_forward_context(None, model.vllm_config, num_tokens=6):
        _, auxiliary = inner.forward(ids, positions)
        model.set_aux_hidden_state_layers(())
        alone = inner.forward(ids, positions)
    for hook in hooks:
        hook.remove()
    return {
        "count": len(auxiliary),
        "default_layers": list(model.get_eagle3_default_aux_hidden_state_layers()),
        "plain_output": isinstance(alone, torch.Tensor),
        # The last is the output of the last layer, which no layer sees; of a model of two layers.
        "differences": [float((auxiliary[i] - seen[i]).abs().max()) for i in (0, 1)],
        "moved": [float((auxiliary[i] - auxiliary[i + 1]).abs().max()) for i in (0, 1)],
    }


def partial_weight_update(model) -> dict:
    """Load a norm and a convolution of a served model, as a weight update does; then a wrong name."""
    norm = model.model.layers[0].operator_norm.weight
    conv = model.model.layers[0].short_conv.conv.weight
    other = model.model.layers[1].operator_norm.weight.clone()
    new_norm, new_conv = torch.rand_like(norm), torch.rand_like(conv)
    loaded = model.load_weights(
        [
            ("model.layers.0.operator_norm.weight", new_norm),
            ("model.layers.0.conv.conv.weight", new_conv.t().unsqueeze(1)),
        ]
    )
    try:
        model.load_weights([("model.layers.0.operator_norm.wieght", new_norm)])
        refused = ""
    except ValueError as error:
        refused = f"{type(error).__name__}: {error}"
    return {
        "loaded": sorted(loaded),
        "norm": bool(torch.equal(norm, new_norm)),
        "conv": bool(torch.equal(conv, new_conv)),
        "other_kept": bool(torch.equal(model.model.layers[1].operator_norm.weight, other)),
        "refused": refused,
    }


def expert_count_update(model) -> str:
    """vLLM tells a model that its ranks hold another number of experts: the refusal's text."""
    try:
        model.update_physical_experts_metadata(8, 1)
    except ValueError as error:
        return str(error)
    return ""
