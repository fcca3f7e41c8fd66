"""Triton's interpreter in place of a GPU, for every kernel in this folder; see ``interpreter.py``."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import interpreter
import pytest


@pytest.fixture(autouse=True)
def right_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts float32 off to bfloat16, where every GPU rounds to nearest even."""
    monkeypatch.setattr(
        interpreter.MODULE,
        "_convert_float",
        interpreter.rounding(interpreter.MODULE._convert_float),
    )


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> interpreter.Watch:
    """What the programs read and write from here on."""
    return interpreter.Watch(monkeypatch)
