"""Fixtures of the suite of real vLLM engines."""

import pytest

from tests.engine_common.engine_fixtures import Suite, interpreting_run, run, server  # noqa: F401
from tests.engine_vllm.engine_env import ENV


@pytest.fixture(scope="session")
def suite() -> Suite:
    return Suite("tests.engine_vllm", ENV)
