"""Prefix caching gives the same tokens, and hits: several turns, shared beginnings, eviction."""

import pytest
import torch

from tests.engine_common.conversations import ANSWER, conversations, hits, shared_beginnings
from tests.engine_common.references import assert_same, cases
from tests.tiers import matrix
from tests.tolerances import BOUNDS

pytestmark = pytest.mark.engine

CACHE = {"dtype": "float32", "enable_prefix_caching": True}


@pytest.mark.parametrize("block", [32, matrix(128)])
@pytest.mark.parametrize("model", ["alpha", matrix("beta")])
def test_turns_and_shared_beginnings(run, model, block):
    """In one engine: five turns of twelve conversations, then a shared system prompt, alone and
    together, then the 200 prompts twice, when the second time finds the first's blocks."""
    talks = conversations(model, turns=5, count=12)
    shared = shared_beginnings(model, common=512, count=24)
    params = {"max_tokens": ANSWER}
    turns = [{"prompts": [t[i].prompt for t in talks], "params": params} for i in range(5)]
    alone = {"prompts": [c.prompt for c in shared[:8]], "params": params, "alone": True}
    together = {"prompts": [c.prompt for c in shared], "params": params}
    everything = {"prompts": [c.prompt for c in cases(model)]}
    steps = [*turns, alone, together, everything, everything]
    result = run(model, {**CACHE, "block_size": block}, steps)["steps"]
    for i in range(5):
        assert_same(result[i], [t[i] for t in talks])
    assert_same(result[5], shared[:8])
    assert_same(result[6], shared)
    assert_same(result[7], cases(model))
    assert_same(result[8], cases(model))
    for i in range(1, 5):
        for out, talk in zip(result[i], talks, strict=True):
            assert out["cached"] >= (len(talk[i - 1].prompt) - 1) // block * block
    # The first of the shared prompts finds nothing, the second leaves what the third one finds.
    assert hits(result[5]) >= 6
    assert hits(result[6]) >= 20
    assert hits(result[8]) > hits(result[7])


@pytest.mark.parametrize("budget", [32, matrix(200)])
def test_chunked_prefill_with_cache(run, budget):
    engine = {**CACHE, "block_size": 32, "max_num_batched_tokens": budget, "max_num_seqs": 16}
    step = {"prompts": [c.prompt for c in cases("alpha")]}
    result = run("alpha", engine, [step, step])["steps"]
    assert_same(result[0], cases("alpha"))
    assert_same(result[1], cases("alpha"))
    assert hits(result[1]) > 40


@pytest.mark.parametrize("dtype", ["float32", matrix("bfloat16")])
def test_a_hit_changes_no_logprob(run, dtype):
    """The same prompt, cold and from the cache: equal tokens, logprobs equal to rounding."""
    asked = shared_beginnings("alpha", common=256, count=16)
    step = {"prompts": [c.prompt for c in asked], "params": {"max_tokens": ANSWER, "logprobs": 0}}
    engine = {**CACHE, "dtype": dtype, "block_size": 32}
    cold, warm = run("alpha", engine, [{**step, "alone": True}, {**step, "alone": True}])["steps"]
    assert hits(warm) == len(asked)
    noise = BOUNDS["engine_logprob", getattr(torch, dtype)].atol
    for first, second in zip(cold, warm, strict=True):
        if dtype == "float32":
            assert first["tokens"] == second["tokens"]
        assert first["logprobs"][0] == pytest.approx(second["logprobs"][0], abs=noise)


def test_eviction_under_pressure(run):
    """A cache for three of these prompts at most: blocks are reused all the time, and hits happen."""
    asked = [c for c in cases("alpha") if 96 <= len(c.prompt) <= 700]
    last = asked[-3:]
    engine = {**CACHE, "block_size": 32, "max_model_len": 1024, "num_gpu_blocks_override": 80}
    order = [asked, last, last, asked, last, last]
    steps = [{"prompts": [c.prompt for c in some]} for some in order]
    result = run("alpha", engine, steps)["steps"]
    for outputs, some in zip(result, order, strict=True):
        assert_same(outputs, some)
    assert hits(result[2]) > 0  # what came last is still there
    assert hits(result[5]) > 0
    assert hits(result[3]) < len(asked) / 2  # what came first is not
