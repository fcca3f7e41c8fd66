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
        ("triton", "LFM2_PLUGIN_OPS=triton: this version has no triton kernels to choose"),
        ("fast", "LFM2_PLUGIN_OPS=fast is unknown. Set it to one of auto, naive, native"),
    ],
)
def test_impossible_choice(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    monkeypatch.setenv(dispatch.ENV, value)
    with pytest.raises(dispatch.ImpossibleChoice, match=message):
        route(torch.zeros(1, 2), None, 1, renormalise=True)


def test_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENV, "naive")
    assert dispatch.implementation("cpu") == "naive"
    monkeypatch.setenv(dispatch.ENV, "native")
    assert dispatch.implementation("cpu") == "naive"
    dispatch.forget()
    assert dispatch.implementation("cpu") == "native"
