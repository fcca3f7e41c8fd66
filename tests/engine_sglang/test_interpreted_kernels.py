"""SGLang's real steps through the kernels for GPUs, in Triton's interpreter: the reference's tokens."""

import pytest
from interpreted import ENV, TOKENS, asked, assert_same_beginnings

pytestmark = pytest.mark.engine


def test_tokens(run):
    prompts = asked("beta")
    step = {"prompts": [c.prompt for c in prompts], "params": {"max_new_tokens": TOKENS}}
    probe = {"op": "probe", "name": "kernels_in_use", "module": "interpreted"}
    options = {"dtype": "float32", "max_running_requests": 4, "chunked_prefill_size": 32}
    first, second, kernels = run("beta", options, [step, step, probe], env=ENV)["steps"]
    assert_same_beginnings(first, prompts)
    assert_same_beginnings(second, prompts)
    assert kernels == ["router", "short_conv"]
