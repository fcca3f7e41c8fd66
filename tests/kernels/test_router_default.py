"""The router's kernel as the default on a GPU: one launch, after a trial that a wrong kernel does not pass."""

from __future__ import annotations

import logging

import pytest
import torch

from lfm2_plugin import dispatch
from lfm2_plugin.ops.router import kernel_devices, route, trial, try_kernel
from lfm2_plugin.ops.router import triton as kernel
from tests.router_launches import BIAS, SCALING, A, E, launches_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def gpu_is_here(interpreted, monkeypatch: pytest.MonkeyPatch):
    """What runs the kernels here counts as a GPU."""
    monkeypatch.delenv(dispatch.ENV, raising=False)
    monkeypatch.setattr(trial, "GPUS", ("cpu",))
    yield
    kernel_devices.clear()
    trial._tried.clear()


@pytest.mark.parametrize("with_padding", [True, False], ids=["padding", "no-padding"])
def test_one_launch_by_default(with_padding: bool) -> None:
    def call(logits: torch.Tensor, padding: torch.Tensor | None) -> tuple:
        return route(logits, BIAS, A, renormalise=True, scaling=SCALING, padding=padding)

    before, after = launches_of(call, with_padding)
    assert len(before) >= 9
    assert after == ["_route"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_passes_and_leaves_no_doubt(dtype: torch.dtype) -> None:
    """Rankings lie apart, so that another way to take an exponential chooses the same experts."""
    for experts in (8, 32, 64, 128):
        try_kernel(CPU, experts, 4, dtype)
        assert kernel_devices == {"cpu"}
        logits, bias, _ = trial.make_trial(experts, dtype, CPU)
        ranking = (logits.sigmoid() + bias).sort(dim=1, descending=True).values[:, :5]
        assert (ranking[:, :-1] - ranking[:, 1:]).min() > 1e-5


def wrong_experts(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = right(*args)
    return weights, ids.flip(1)


def wrong_weights(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = right(*args)
    return weights * 1.001, ids


def not_a_number(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = right(*args)
    return weights * float("nan"), ids


def does_not_compile(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
    raise RuntimeError("no such instruction")


right = kernel.route_triton
FAULTS = {
    wrong_experts: "33 of 33 tokens went to other experts",
    wrong_weights: "weights differ by 1.0e-03",
    not_a_number: "weights differ by nan",
    does_not_compile: "RuntimeError: no such instruction",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_faulty_kernel_is_named_and_not_used(monkeypatch, caplog, fault) -> None:
    monkeypatch.setattr(kernel, "route_triton", fault)
    with caplog.at_level(logging.WARNING):
        try_kernel(CPU, E, A, torch.float32)
        try_kernel(CPU, E, A, torch.float32)  # the next layer says nothing
    assert len(caplog.records) == 1
    assert FAULTS[fault] in caplog.text
    assert not kernel_devices


@pytest.mark.parametrize("ops", ["native", "naive", "triton"])
def test_what_the_user_names_is_not_tried(monkeypatch, ops: str) -> None:
    monkeypatch.setenv(dispatch.ENV, ops)
    monkeypatch.setattr(kernel, "route_triton", does_not_compile)
    try_kernel(CPU, E, A, torch.float32)
    assert not kernel_devices


def test_a_cpu_is_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(trial, "GPUS", ("cuda",))
    try_kernel(CPU, E, A, torch.float32)
    assert not kernel_devices
