"""The parameters of a short convolution as both engines load them: one rank's channels of a checkpoint's tensors."""

from __future__ import annotations

import torch
from torch import nn


class DepthwiseKernel(nn.Module):
    """The convolution's weight (D, K) and bias (D,), D per rank; loads the (D, 1, K) of a checkpoint.

    In memory the weight lies tap after tap: an operator that goes over channels reads each tap as one piece.

    Args:
        channels: D of this rank.
        width: K.
        bias: whether there is one.
        rank: which of the equal shares of the channels is this rank's.
    """

    def __init__(self, channels: int, width: int, bias: bool, rank: int) -> None:
        super().__init__()
        self._first = rank * channels
        self.weight = self._parameter(torch.zeros(width, channels).t())
        self.bias = self._parameter(torch.zeros(channels)) if bias else None

    def _parameter(self, values: torch.Tensor) -> nn.Parameter:
        parameter = nn.Parameter(values, requires_grad=False)
        # The hook on a parameter by which vLLM and SGLang load it.
        parameter.weight_loader = self._load
        return parameter

    def _load(self, parameter: nn.Parameter, loaded: torch.Tensor) -> None:
        if loaded.dim() == 3:
            loaded = loaded.squeeze(1)
        parameter.data.copy_(loaded[self._first : self._first + parameter.shape[0]])
