"""The GPU benchmark calls the engine's own kernels right, and they give what ours give; in Triton's interpreter."""

import pytest

from tests.engine_common.builtin_kernels import CASES, compared

pytestmark = [pytest.mark.engine, pytest.mark.matrix]


def test_the_built_ins_kernels_are_ours_to_the_state():
    said = compared("sglang")
    assert [line for line in said.splitlines() if line.startswith("equal")] == [
        f"equal: {case.name}" for case in CASES
    ]
