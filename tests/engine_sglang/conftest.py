"""Fixtures of the suite of real SGLang engines."""

import pytest

from sglang_model.cpu_torch import let_torchvision_import

let_torchvision_import()  # transformers imports it where it is installed, and here it is for SGLang
from tests.engine_common.engine_fixtures import (  # noqa: E402
    Suite,
    interpreting_run,  # noqa: F401
    interpreting_server,  # noqa: F401
    run,  # noqa: F401
    server,  # noqa: F401
)
from tests.engine_sglang.engine_env import ENV  # noqa: E402


@pytest.fixture(scope="session")
def suite() -> Suite:
    return Suite("tests.engine_sglang", ENV)
