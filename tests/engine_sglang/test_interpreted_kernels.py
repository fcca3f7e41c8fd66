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


def test_the_default_convolution_is_the_naive_one(interpreting_server):
    """Decodes, extensions, snapshots, sequences that aren't there: ``gpu_path_jobs``."""
    env = {"LFM2_PLUGIN_OPS": "auto"}
    found = interpreting_server.run("gpu_path_jobs:default_path", env=env).get()
    assert len(found) >= 11
    assert {name: said for name, said in found.items() if said != "equal"} == {}


def test_the_default_routing_is_one_launch(interpreting_server):
    env = {"LFM2_PLUGIN_OPS": "auto"}
    before, after = interpreting_server.run("gpu_path_jobs:routing", env=env).get()
    assert len(before) >= 7
    assert after == ["_route"]
