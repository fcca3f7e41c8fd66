"""The parameters of a short convolution as both engines load them: one rank's channels of a checkpoint's tensors."""

from __future__ import annotations

import torch
from torch import nn


class DepthwiseKernel(nn.Module):
    """The convolution's weight (K, D) and bias (D,), D per rank; loads the (D, 1, K) of a checkpoint.

    The parameter is a checkpoint's transposed, since an operator that goes over channels reads each tap as one piece,
    and contiguous, since the engines save and copy parameters as flat memory. Operators take :attr:`by_channel`.

    Args:
        channels: D of this rank.
        width: K.
        bias: whether there is one.
        rank: which of the equal shares of the channels is this rank's.
    """

    def __init__(self, channels: int, width: int, bias: bool, rank: int) -> None:
        super().__init__()
        self._first = rank * channels
        self.weight = self._parameter(torch.zeros(width, channels))
        self.bias = self._parameter(torch.zeros(channels)) if bias else None

    @property
    def by_channel(self) -> torch.Tensor:
        """The weight as a view (D, K); taken anew for every use, it is right after every update."""
        return self.weight.t()

    def _parameter(self, values: torch.Tensor) -> nn.Parameter:
        parameter = nn.Parameter(values, requires_grad=False)
        # The hook on a parameter by which vLLM and SGLang load it.
        parameter.weight_loader = self._load
        return parameter

    def _load(self, parameter: nn.Parameter, loaded: torch.Tensor) -> None:
        channels = parameter.shape[-1]
        share = loaded[self._first : self._first + channels]
        if share.dim() == 3:
            share = share.squeeze(1)
        parameter.data.copy_(share.t() if share.dim() == 2 else share)
