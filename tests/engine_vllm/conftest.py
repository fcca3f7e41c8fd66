"""Fixtures of the suite of real vLLM engines."""

import pytest

from tests.engine_common.engine_fixtures import (
    Suite,
    interpreting_run,  # noqa: F401
    interpreting_server,  # noqa: F401
    run,  # noqa: F401
    server,  # noqa: F401
)
from tests.engine_vllm.engine_env import ENV


@pytest.fixture(scope="session")
def suite() -> Suite:
    return Suite("tests.engine_vllm", ENV)
