"""A KV cache too small for the load: requests are preempted, computed again, and answer the same."""

import pytest
from references import assert_same, assert_same_but_for_ties, cases

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("model", "dtype", "cache"),
    [
        ("alpha", "float32", False),
        ("alpha", "float32", True),
        ("beta", "float32", False),
        ("beta", "float32", True),
        ("alpha", "bfloat16", True),
    ],
)
def test_preempted_requests_answer_the_same(run, model, dtype, cache):
    asked = [c for c in cases(model) if 17 <= len(c.prompt) <= 200]
    engine = {
        "dtype": dtype,
        "enable_prefix_caching": cache,
        "block_size": 32,
        "max_model_len": 512,
        "num_gpu_blocks_override": 90,
    }
    result = run(model, engine, [{"prompts": [c.prompt for c in asked]}])
    same = assert_same if dtype == "float32" else assert_same_but_for_ties
    same(result["steps"][0], asked)
    assert result["metrics"]["vllm:num_preemptions"] > 0
    assert any(step["preempted"] for step in result["scheduled"])
