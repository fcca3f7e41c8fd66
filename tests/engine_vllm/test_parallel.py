"""Several processes: tensor, pipeline and expert parallel give the tokens of one process."""

import pytest

from lfm2_plugin.cli.server import ServerFailed
from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.references import assert_bf16, assert_same, cases
from tests.engine_vllm.serving import served
from tests.tiers import matrix

pytestmark = pytest.mark.engine

OURS = "vllm_model.model.Lfm2MoeForCausalLM"


def ask(run, model: str, dtype: str = "float32", cache: bool = False, env=None, **engine) -> dict:
    """All prompts in batches of 64 with chunks, on two processes; twice where a cache is on."""
    step = {"prompts": [c.prompt for c in cases(model)], "params": {"logprobs": 0}}
    options = {"dtype": dtype, "enable_prefix_caching": cache, "max_num_batched_tokens": 512}
    result = run(model, {**options, **engine}, [step] * (1 + cache), env=env, timeout=400)
    assert result["class"] == [OURS] * 2
    for outputs in result["steps"]:
        if dtype == "float32":
            assert_same(outputs, cases(model))
        else:
            assert_bf16(model, outputs)
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
    ask(run, model, dtype, cache, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("model", "cache", "partition"),
    [
        ("staged", True, "3,3"),  # the first stage has no expert layer
        matrix("staged", False, "2,4"),  # one conv layer and three
        matrix("beta", True, "3,2"),  # two conv layers and one
    ],
)
def test_pipeline_parallel(run, model, cache, partition):
    env = {"VLLM_PP_LAYER_PARTITION": partition}
    options = {"pipeline_parallel_size": 2, "enforce_eager": False, "env": env}
    ask(run, model, cache=cache, **options)


@pytest.mark.parametrize(
    ("model", "partition", "eager", "text"),
    [
        matrix("staged", "3,3", True, "Leave out --enforce-eager"),
        ("alpha", "3,3", False, "would hold layers 3 to 5 and no attention layer"),
        matrix("beta", "1,4", False, "would hold layers 0 to 0 and no short convolution layer"),
    ],
)
def test_pipelines_that_the_engine_can_not_run_are_refused(run, model, partition, eager, text):
    engine = {"dtype": "float32", "pipeline_parallel_size": 2, "enforce_eager": eager}
    refused = run.outcome(model, engine, [], env={"VLLM_PP_LAYER_PARTITION": partition})
    assert refused.error is not None
    assert text in refused.log


@pytest.mark.parametrize(
    ("model", "dtype"), [("alpha", "float32"), matrix("beta-calm", "bfloat16")]
)
def test_expert_parallel(run, model, dtype):
    ask(run, model, dtype, tensor_parallel_size=2, enable_expert_parallel=True)


@pytest.mark.matrix  # that it is refused without a process of its own: test_options.py
def test_data_parallel_is_refused_on_a_cpu(tmp_path):
    """vLLM's CPU communicator lacks the gather that an MoE model's replicas need, whatever the model."""
    options = ["--dtype", "float32", "--data-parallel-size", "2", "--skip-tokenizer-init"]
    options += ["--enforce-eager", "--max-model-len", "2304"]
    log = tmp_path / "log"
    with pytest.raises(ServerFailed), served(checkpoint("alpha"), options, log):
        pass
    assert "Start one server for each replica" in log.read_text()
