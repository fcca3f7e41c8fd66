"""A KV cache too small for the load: requests are preempted, computed again, and answer the same."""

import pytest

from tests.engine_common.references import assert_bf16, assert_same, cases
from tests.tiers import matrix

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("model", "dtype", "cache"),
    [
        ("alpha", "float32", False),
        matrix("alpha", "float32", True),
        matrix("beta", "float32", False),
        matrix("beta", "float32", True),
        matrix("alpha-calm", "bfloat16", True),
    ],
)
def test_preempted_requests_answer_the_same(run, model, dtype, cache):
    chosen = [i for i, c in enumerate(cases(model)) if 17 <= len(c.prompt) <= 200]
    asked = [cases(model)[i] for i in chosen]
    engine = {
        "dtype": dtype,
        "enable_prefix_caching": cache,
        "block_size": 32,
        "max_model_len": 512,
        "num_gpu_blocks_override": 90,
    }
    step = {"prompts": [c.prompt for c in asked], "params": {"logprobs": 0}}
    result = run(model, engine, [step])
    if dtype == "float32":
        assert_same(result["steps"][0], asked)
    else:
        assert_bf16(model, result["steps"][0], chosen)
    assert result["metrics"]["vllm:num_preemptions"] > 0
    assert any(step["preempted"] for step in result["scheduled"])
