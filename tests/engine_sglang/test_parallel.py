"""Several processes: tensor, expert and pipeline parallel give the tokens of one process."""

import pytest

from sglang_model.engine_api import snapshots_can_run
from tests.engine_common.references import assert_bf16, assert_same, cases
from tests.tiers import matrix

pytestmark = pytest.mark.engine

# On a CPU SGLang gives each rank a NUMA node, or the cores that are named here.
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
OURS = "sglang_model.model.Lfm2MoeForCausalLM"


def ask(
    run, model: str, dtype: str = "float32", cache: bool = False, env=TWO_RANKS, **engine
) -> dict:
    """All prompts in batches of 64 with chunks, on two processes; twice where a cache is on."""
    step = {"prompts": [c.prompt for c in cases(model)], "params": {"logprobs": 0}}
    options = {"dtype": dtype, "disable_radix_cache": not cache, "chunked_prefill_size": 512}
    result = run(model, {**options, **engine}, [step] * (1 + cache), env=env, timeout=400)
    assert result["class"] == [OURS] * 2
    for outputs in result["steps"]:
        if dtype == "float32":
            assert_same(outputs, cases(model))
        else:
            assert_bf16(model, outputs)
    if cache and snapshots_can_run():
        assert sum(out["cached"] > 0 for out in result["steps"][1]) > 100
    return result


@pytest.mark.parametrize(
    ("model", "dtype", "cache"),
    [
        ("alpha", "float32", True),
        matrix("beta", "float32", False),
        matrix("beta-calm", "bfloat16", False),
    ],
)
def test_tensor_parallel(run, model, dtype, cache):
    overlaps = not cache or snapshots_can_run()
    assert ask(run, model, dtype, cache, tp_size=2)["loop"] == ("overlap" if overlaps else "normal")


@pytest.mark.parametrize(
    ("model", "dtype"), [("alpha", "float32"), matrix("beta-calm", "bfloat16")]
)
def test_expert_parallel(run, model, dtype):
    ask(run, model, dtype, tp_size=2, ep_size=2)


@pytest.mark.parametrize(
    ("model", "cache", "partition"),
    [
        ("staged", True, "3,3"),  # the first stage has no expert layer
        matrix("staged", False, "2,4"),  # one conv layer and three
        matrix("beta", True, "3,2"),  # an untied head; two conv layers and one
    ],
)
def test_pipeline_parallel(run, model, cache, partition):
    env = {**TWO_RANKS, "SGLANG_PP_LAYER_PARTITION": partition}
    assert ask(run, model, cache=cache, pp_size=2, env=env)["loop"] == "pp"
