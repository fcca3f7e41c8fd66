"""The routing that a model on a GPU has by default, tried in Triton's interpreter: its launches and its choice."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lfm2_plugin.ops.router import route_naive, trial
from lfm2_plugin.ops.router import triton as kernel
from tests.launches import Launches
from tests.tolerances import assert_within

E, A, SCALING = 32, 4, 1.5
BIAS = torch.randn(E, generator=torch.Generator().manual_seed(1)) * 0.3
Route = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Weights and ids (T, A) of logits (T, E) and padding (T,)."""


def launches_of(route: Route, with_padding: bool = True) -> list[list[str]]:
    """What an engine's routing launches before the trial and after it; its choice is the naive twin's.

    Raises:
        AssertionError: another choice.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(21, E, generator=generator)
    padding = torch.arange(21) >= 17 if with_padding else None
    expected = route_naive(logits, BIAS, A, True, SCALING, padding)
    found = []
    gpus, launch = trial.GPUS, kernel._route
    try:
        trial.GPUS = ("cpu",)  # Triton's interpreter is on one
        for tried in (False, True):
            if tried:
                trial.try_kernel(torch.device("cpu"), E, A, torch.float32)
            with Launches() as launches:
                kernel._route = launches.watched(launch)
                weights, ids = route(logits, padding)
            kernel._route = launch
            assert torch.equal(ids.int(), expected[1])
            assert_within("router", weights, expected[0])
            found.append(launches.names)
    finally:
        trial.GPUS, kernel._route = gpus, launch
        trial.kernel_devices.clear()
        trial._tried.clear()
    return found
