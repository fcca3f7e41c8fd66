"""What every test gets: memory that nobody wrote is NaN, so that a result left unwritten cannot pass for one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from lfm2_plugin import dispatch

_OURS = ("lfm2_plugin", "vllm_model", "sglang_model")


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] in _OURS:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype != torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fill what our own packages get from torch.empty and its kin with NaN, or the largest integer."""
    if "engine" in request.keywords:
        return  # an engine compiles and captures these calls
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def fresh_dispatch() -> Iterator[None]:
    """No test inherits the choice of implementation of the test before."""
    dispatch.forget()
    yield
    dispatch.forget()
