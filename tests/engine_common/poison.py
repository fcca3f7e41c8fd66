"""Parameters that no loader fills: NaN until something is loaded, and an error where NaN stays."""

import torch
from torch import nn

OURS = ("vllm_model", "sglang_model")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def poison(model: nn.Module) -> nn.Module:
    """Fill the parameters of a freshly built model of ours with NaN, and look for it after the first load.

    Single numbers stay: an engine's scale may say by its value that it wasn't loaded.
    """
    if type(model).__module__.partition(".")[0] not in OURS:
        return model
    filled = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dtype in DTYPES and parameter.numel() > 1 and not parameter.is_meta
    }
    for parameter in filled.values():
        parameter.data.fill_(float("nan"))
    load = model.load_weights

    def load_weights(weights):
        loaded = load(weights)
        left = [name for name, parameter in filled.items() if bool(parameter.isnan().any())]
        assert not left, f"not all of these was loaded: {left}"
        del model.load_weights  # what comes later is an update
        return loaded

    model.load_weights = load_weights
    return model
