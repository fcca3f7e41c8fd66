"""SGLang's real steps through the kernels for GPUs, in Triton's interpreter: the reference's tokens."""

import pytest

from tests.engine_common.interpreted import TOKENS, asked, assert_same_beginnings

pytestmark = pytest.mark.engine


def test_tokens(interpreting_run):
    prompts = asked("beta")
    step = {"prompts": [c.prompt for c in prompts], "params": {"max_new_tokens": TOKENS}}
    probe = {"op": "probe", "name": "kernels_in_use", "module": "tests.engine_common.kernel_probes"}
    options = {"dtype": "float32", "max_running_requests": 4, "chunked_prefill_size": 32}
    first, second, kernels = interpreting_run("beta", options, [step, step, probe])["steps"]
    assert_same_beginnings(first, prompts)
    assert_same_beginnings(second, prompts)
    assert kernels == ["router", "short_conv"]
