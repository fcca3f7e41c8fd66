"""vLLM's real steps through the kernels for GPUs, in Triton's interpreter: the reference's tokens."""

import pytest
from interpreted import TOKENS, asked, assert_same_beginnings

pytestmark = [pytest.mark.engine, pytest.mark.slow]

DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
MODES = {
    # Chunks beside decodes, and checkpoints for the prefix cache, which the second round finds.
    "prefix cache, chunked": {
        "enable_prefix_caching": True,
        "block_size": 32,
        "max_num_batched_tokens": 32,
    },
    "drafts": {"enable_prefix_caching": False, "speculative_config": DRAFTS},
}


@pytest.mark.parametrize("engine", MODES.values(), ids=MODES)
def test_tokens(interpreting_run, engine):
    prompts = asked("beta")
    step = {"prompts": [c.prompt for c in prompts], "params": {"max_tokens": TOKENS}}
    probe = {"op": "probe", "name": "kernels_in_use", "module": "kernel_probes"}
    steps = [step, step, probe]
    options = {"dtype": "float32", "max_num_seqs": 4, **engine}
    first, second, kernels = interpreting_run("beta", options, steps)["steps"]
    assert_same_beginnings(first, prompts)
    assert_same_beginnings(second, prompts)
    assert kernels == ["router", "short_conv"]
    if engine.get("enable_prefix_caching"):
        assert any(out["cached"] for out in second)
