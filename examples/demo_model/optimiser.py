"""The optimiser: Muon for the dense matrices, Adam for everything else, one learning-rate schedule for both."""

from __future__ import annotations

import torch
from torch import nn


def orthogonalised(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrix, roughly, by a quintic Newton-Schulz iteration.

    Args:
        matrix: (..., rows, columns) float32; leading dimensions are independent matrices.
        steps: of the iteration.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, so that every direction of a matrix learns at one pace."""

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalised(p.grad.lerp(state["momentum"], group["momentum"]))
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * scale)


def build(model: nn.Module, matrix_lr: float, other_lr: float) -> list[torch.optim.Optimizer]:
    """The two optimisers: dense projections by Muon; embeddings, experts, routers, norms and convolutions by Adam.

    The experts would learn a little faster by Muon too, but orthogonalising that many matrices takes a fifth of a step.
    """
    matrices, others = [], []
    for name, p in model.named_parameters():
        muon = p.ndim == 2 and "embed_tokens" not in name and ".gate." not in name
        (matrices if muon else others).append(p)
    made = [
        Muon(matrices, matrix_lr),
        torch.optim.Adam(others, other_lr, betas=(0.9, 0.98), eps=1e-8),
    ]
    for optimiser in made:
        for group in optimiser.param_groups:
            group["peak_lr"] = group["lr"]
    return made


def schedule(
    optimisers: list[torch.optim.Optimizer],
    step: int,
    steps: int,
    warmup: int = 40,
    decay: float = 0.4,
) -> float:
    """Set the learning rates for a step: up over ``warmup`` steps, level, down over the last share ``decay`` of them.

    Returns the factor on the peak rates, in (0, 1].
    """
    left = (steps - step) / steps
    factor = min(1.0, (step + 1) / warmup, left / decay)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak_lr"] * factor
    return factor
