"""A KV cache too small for the load: requests are retracted, computed again, and answer the same."""

import pytest

from tests.engine_common.checkpoints import altered, checkpoint
from tests.engine_common.hf_reference import greedy
from tests.engine_common.references import NEW_TOKENS, Case, assert_bf16, assert_same, cases
from tests.tiers import matrix
from tests.tolerances import CLEAR_MARGIN

pytestmark = pytest.mark.engine

ANSWER = 96  # tokens, more than most of the prompts, so that it is decoding that fills the cache
# SGLang lets a prompt in if the running answers will need a share of their allowed length, which it
# lowers from step to step; here to nothing, in two steps.
RECKLESS = {"SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR": "0", "SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS": "2"}


@pytest.fixture
def endless(tmp_path):
    """A checkpoint whose answers don't end by themselves, made of a named one.

    "ignore_eos" would do that too, but then SGLang reserves the whole answer's room.
    """

    def make(name: str):
        folder = altered(checkpoint(name), tmp_path / name, config={"eos_token_id": 100_000})
        (folder / "generation_config.json").unlink()
        return folder

    return make


def answer_under_pressure(run, folder, prompts: list[list[int]], **options) -> list[dict]:
    engine = {"context_length": 256, "max_total_tokens": 1600, **options}
    # Of unequal length, so that there is room for a prompt while others are in mid-answer.
    lengths = [ANSWER if i % 2 else NEW_TOKENS + i % 80 for i in range(len(prompts))]
    params = [{"ignore_eos": False, "max_new_tokens": n, "logprobs": 0} for n in lengths]
    step = {"prompts": prompts, "params": params}
    (outputs,) = run(folder, engine, [step], env=RECKLESS)["steps"]
    assert sum(out["retractions"] for out in outputs) > 10
    return outputs


@pytest.mark.parametrize(
    "options",
    [
        matrix({"disable_radix_cache": True}),
        {},
        matrix({"chunked_prefill_size": 32, "enable_mixed_chunk": True}),
        matrix({"disable_overlap_schedule": True}),
    ],
    ids=["no cache", "cache", "mixed", "no overlap"],
)
@pytest.mark.parametrize("model", ["alpha", matrix("beta")])
def test_retracted_requests_answer_the_same(run, endless, model, options):
    prompts = [c.prompt for c in cases(model) if 5 <= len(c.prompt) <= 64]
    pairs = zip(prompts, greedy(checkpoint(model), prompts, ANSWER), strict=True)
    asked = [Case(p, a) for p, a in pairs if min(a.margins) >= CLEAR_MARGIN]
    assert len(asked) > 100
    prompts = [c.prompt for c in asked]
    outputs = answer_under_pressure(run, endless(model), prompts, dtype="float32", **options)
    assert_same(outputs, asked)


@pytest.mark.matrix
def test_retracted_requests_in_bfloat16(run, endless):
    name = "alpha-calm"
    chosen = [i for i, c in enumerate(cases(name)) if 5 <= len(c.prompt) <= 64]
    prompts = [cases(name)[i].prompt for i in chosen]
    outputs = answer_under_pressure(run, endless(name), prompts, dtype="bfloat16")
    cut = [{key: out[key][:NEW_TOKENS] for key in ("tokens", "logprobs")} for out in outputs]
    assert_bf16(name, cut, chosen)
