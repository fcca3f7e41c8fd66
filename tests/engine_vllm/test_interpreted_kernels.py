"""vLLM's real steps through kernels for GPUs, in Triton's interpreter: the reference's tokens.

The kernels are ours and those of vLLM's runners: V1, which all other tests have, and V2, the default on GPUs. Of the
default way on a GPU, which has vLLM's kernels for the convolution, a layer alone runs.
"""

import pytest

from tests.engine_common.interpreted import TOKENS, asked, assert_same_beginnings
from tests.engine_common.references import assert_same, cases
from tests.tiers import matrix

pytestmark = pytest.mark.engine

DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
RUNNERS = {"V1": "0", "V2": "1"}
DEFAULT_OPS = {"LFM2_PLUGIN_OPS": "auto"}
MODES = {
    # Chunks beside decodes, and checkpoints for the prefix cache, which the second round finds.
    "prefix cache, chunked": {
        "enable_prefix_caching": True,
        "block_size": 32,
        "max_num_batched_tokens": 32,
    },
    "drafts": {"enable_prefix_caching": False, "speculative_config": DRAFTS},
}


def on_runner(runner: str, **env: str) -> dict[str, str]:
    return {"VLLM_USE_V2_MODEL_RUNNER": RUNNERS[runner], **env}


@pytest.mark.parametrize(
    ("mode", "runner"), [("prefix cache, chunked", "V2"), matrix("drafts", "V1")]
)
def test_tokens(interpreting_run, mode, runner):
    engine = MODES[mode]
    prompts = asked("beta")
    step = {"prompts": [c.prompt for c in prompts], "params": {"max_tokens": TOKENS}}
    probe = {"op": "probe", "name": "kernels_in_use", "module": "tests.engine_common.kernel_probes"}
    steps = [step, step, probe]
    options = {"dtype": "float32", "max_num_seqs": 4, **engine}
    first, second, kernels = interpreting_run("beta", options, steps, env=on_runner(runner))[
        "steps"
    ]
    assert_same_beginnings(first, prompts)
    assert_same_beginnings(second, prompts)
    assert kernels == ["router", "short_conv"]
    if engine.get("enable_prefix_caching"):
        assert any(out["cached"] for out in second)


@pytest.mark.matrix
@pytest.mark.parametrize("runner", RUNNERS)
def test_drafts_beside_the_prefix_cache(interpreting_run, runner):
    """The runner's kernels copy a state on, accepted drafts and all, where a block ends; our operator is native."""
    prompts = [case for case in cases("demo") if len(case.prompt) <= 300][::16]
    step = {"prompts": [case.prompt for case in prompts]}
    probe = {"op": "probe", "name": "has_v2_runner"}
    options = {
        "dtype": "float32",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "block_size": 32,
        "enable_prefix_caching": True,
        "speculative_config": DRAFTS,
    }
    env = on_runner(runner, LFM2_PLUGIN_OPS="auto")
    result = interpreting_run("demo", options, [step, step, probe], env=env)
    first, second, has_v2 = result["steps"]
    assert has_v2 is (runner == "V2")
    assert_same(first, prompts)
    assert_same(second, prompts)
    assert any(out["cached"] for out in second)
    assert result["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 20


def test_the_default_convolution_is_the_naive_one(interpreting_server):
    """Decodes, prefills, both, checkpoints, drafts, padding: ``gpu_path_jobs.CASES``."""
    found = interpreting_server.run("gpu_path_jobs:default_path", env=DEFAULT_OPS).get()
    assert len(found) >= 15
    assert {name: said for name, said in found.items() if said != "equal"} == {}


def test_a_step_that_leaves_out_a_layers_state_is_an_error(interpreting_server):
    """Not zeros, which only a step without any metadata has: vLLM measures its memory by those."""
    said = interpreting_server.run("gpu_path_jobs:missing_page", env=DEFAULT_OPS).get()
    assert set(said) == {"forward_native", "forward_cuda"}
    for text in said.values():
        assert "model.layers.3.short_conv" in text
        assert "model.layers.2.conv_state" in text


def test_the_default_routing_is_one_launch(interpreting_server):
    before, after = interpreting_server.run("gpu_path_jobs:routing", env=DEFAULT_OPS).get()
    assert len(before) >= 9
    assert after == ["_route"]
