"""The GPU benchmarks: vLLM's own kernels called right, in Triton's interpreter, and its engine as a server has it."""

import pytest

from tests.engine_common.builtin_kernels import CASES, compared
from tests.engine_common.checkpoints import checkpoint

pytestmark = pytest.mark.engine


@pytest.mark.matrix
def test_the_built_ins_kernels_are_ours_to_the_state():
    said = compared("vllm")
    assert [line for line in said.splitlines() if line.startswith("equal")] == [
        f"equal: {case.name}" for case in CASES
    ]


def test_a_step_has_as_many_tokens_as_a_servers(server):
    """vLLM's default depends on who starts the engine: 8,192 for a server on an H100, 2,048 for an engine alone."""
    folder = str(checkpoint("small"))
    assert server.run("benchmark_jobs:tokens_of_a_step", model=folder).get() == 8192
