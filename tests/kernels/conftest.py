"""Where the kernels of this folder run: in Triton's interpreter, or with ``LFM2_TEST_DEVICE=cuda`` on a GPU."""

import os

DEVICE = os.environ.get("LFM2_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import pytest  # noqa: E402

from tests.interpreter_mends import mend  # noqa: E402
from tests.kernels import interpreter  # noqa: E402

if DEVICE == "cpu":
    mend()


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture
def interpreted() -> None:
    if DEVICE != "cpu":
        pytest.skip("asks the interpreter what a GPU doesn't tell")


@pytest.fixture
def watch(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> interpreter.Watch:
    """What the programs read and write from here on."""
    return interpreter.Watch(monkeypatch)
