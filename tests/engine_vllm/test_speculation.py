"""n-gram speculation: drafts are made and accepted, and the tokens are those of the model alone."""

import pytest

from tests.engine_common.references import assert_bf16, assert_same, cases
from tests.tiers import matrix

pytestmark = pytest.mark.engine


def ngram(count: int) -> dict:
    return {
        "method": "ngram",
        "num_speculative_tokens": count,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }


def engine_with(count: int, **options) -> dict:
    return {
        "dtype": "float32",
        "enable_prefix_caching": False,
        "speculative_config": ngram(count),
        **options,
    }


def assert_drafts_were_used(metrics: dict[str, float], share: float = 0.0) -> None:
    """Drafts were verified, and more than ``share`` of their tokens accepted, but not all."""
    drafted = metrics["vllm:spec_decode_num_draft_tokens"]
    accepted = metrics["vllm:spec_decode_num_accepted_tokens"]
    assert share * drafted <= accepted < drafted
    assert drafted > 100


@pytest.mark.parametrize(
    ("model", "count", "share"),
    [
        ("demo", 3, 0.1),  # copies much of its prompts
        *[matrix("demo", count, 0.1) for count in (1, 2, 5, 8)],
        *[
            matrix("alpha", 3, 0),
            matrix("beta", 4, 0),
            matrix("beta", 7, 0),
        ],  # random: nearly all is rejected
    ],
)
def test_tokens_are_those_of_the_model(run, model, count, share):
    asked = cases(model)
    step = {"prompts": [c.prompt for c in asked]}
    result = run(model, engine_with(count), [step])
    assert_same(result["steps"][0], asked)
    assert_drafts_were_used(result["metrics"], share)


def test_with_chunked_prefill_and_few_blocks(run):
    """Drafts beside chunks of other prompts, and preemptions."""
    asked = [c for c in cases("demo") if len(c.prompt) <= 400]
    options = {
        "max_num_batched_tokens": 96,
        "max_num_seqs": 32,
        "block_size": 32,
        "max_model_len": 512,
        "num_gpu_blocks_override": 60,
    }
    result = run("demo", engine_with(3, **options), [{"prompts": [c.prompt for c in asked]}])
    assert_same(result["steps"][0], asked)
    assert_drafts_were_used(result["metrics"])
    assert result["metrics"]["vllm:num_preemptions"] > 0


@pytest.mark.matrix
def test_compiled_bfloat16(run):
    engine = engine_with(3, dtype="bfloat16", enforce_eager=False)
    step = {"prompts": [c.prompt for c in cases("demo")], "params": {"logprobs": 0}}
    result = run("demo", engine, [step])
    assert_bf16("demo", result["steps"][0])
    assert_drafts_were_used(result["metrics"], 0.1)


def test_together_with_prefix_caching_is_refused_on_a_cpu(run):
    engine = {**engine_with(3), "enable_prefix_caching": True}
    refused = run.outcome("alpha", engine, [])
    assert refused.error.startswith("ValueError")
    assert "--no-enable-prefix-caching" in refused.error
