from __future__ import annotations

import pytest
import torch

from lfm2_plugin import dispatch
from lfm2_plugin.ops.router import route


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "native"),
        ("", "native"),
        ("auto", "native"),
        ("naive", "naive"),
        (" NATIVE ", "native"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_choice(monkeypatch: pytest.MonkeyPatch, value, expected: str, device: str) -> None:
    if value is None:
        monkeypatch.delenv(dispatch.ENV, raising=False)
    else:
        monkeypatch.setenv(dispatch.ENV, value)
    assert dispatch.implementation(device) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("triton", "LFM2_PLUGIN_OPS=triton needs a GPU, and this model is on the device 'cpu'"),
        ("fast", "LFM2_PLUGIN_OPS=fast is unknown. Set it to one of auto, naive, native, triton"),
    ],
)
def test_impossible_choice(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    monkeypatch.setenv(dispatch.ENV, value)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(dispatch.ImpossibleChoice, match=message):
        route(torch.zeros(1, 2), None, 1, renormalise=True)


def test_triton_is_for_the_ops_that_have_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENV, "triton")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    assert dispatch.implementation("cuda", triton=True) == "triton"
    assert dispatch.implementation("cuda") == "native"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.implementation("cpu", triton=True) == "triton"


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENV, "triton")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(dispatch.ImpossibleChoice, match="the package triton is not installed"):
        dispatch.implementation("cuda", triton=True)


@pytest.mark.parametrize(
    ("value", "device", "graphs", "words"),
    [
        ("foo", "cpu", False, "LFM2_PLUGIN_OPS=foo is unknown"),
        ("foo", "cuda", True, "LFM2_PLUGIN_OPS=foo is unknown"),
        ("triton", "cpu", False, "LFM2_PLUGIN_OPS=triton needs a GPU"),
        ("naive", "cuda", True, "LFM2_PLUGIN_OPS=naive reads values back .* --enforce-eager"),
        (
            "native",
            "cuda",
            True,
            "LFM2_PLUGIN_OPS=native reads values back .* --disable-cuda-graph",
        ),
    ],
)
def test_a_choice_that_would_fail_in_the_first_step_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str, device: str, graphs: bool, words: str
) -> None:
    monkeypatch.setenv(dispatch.ENV, value)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(dispatch.ImpossibleChoice, match=words):
        dispatch.check_choice(device, captures_graphs=graphs)


@pytest.mark.parametrize(
    ("value", "device", "graphs"),
    [
        (None, "cuda", True),  # the engines' own kernels
        ("auto", "cuda", True),
        ("triton", "cuda", True),
        ("native", "cuda", False),
        ("naive", "cpu", True),  # a CPU captures nothing
    ],
)
def test_a_choice_that_runs_is_not_refused(
    monkeypatch: pytest.MonkeyPatch, value: str | None, device: str, graphs: bool
) -> None:
    monkeypatch.delenv(dispatch.ENV, raising=False)
    if value is not None:
        monkeypatch.setenv(dispatch.ENV, value)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    dispatch.check_choice(device, captures_graphs=graphs)


@pytest.mark.parametrize(("value", "forced"), [(None, False), ("auto", False), ("native", True)])
def test_a_choice_of_the_user(monkeypatch: pytest.MonkeyPatch, value, forced: bool) -> None:
    """On a GPU the engine's kernels run unless the user names ours."""
    monkeypatch.delenv(dispatch.ENV, raising=False)
    if value is not None:
        monkeypatch.setenv(dispatch.ENV, value)
    assert dispatch.is_forced() is forced


def test_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENV, "naive")
    assert dispatch.implementation("cpu") == "naive"
    monkeypatch.setenv(dispatch.ENV, "native")
    assert dispatch.implementation("cpu") == "naive"
    dispatch.forget()
    assert dispatch.implementation("cpu") == "native"
