"""The radix cache gives the same tokens, and hits: several turns, shared beginnings, branches, eviction."""

import random

import pytest
import torch

from sglang_model.config import SNAPSHOT_GRID
from tests.engine_common.conversations import (
    ANSWER,
    answered,
    clear,
    conversations,
    hits,
    shared_beginnings,
)
from tests.engine_common.prompts import fresh_tokens
from tests.engine_common.references import Case, assert_same, cases, vocabulary
from tests.engine_sglang.releases import needs_snapshots
from tests.tiers import matrix
from tests.tolerances import BOUNDS

pytestmark = pytest.mark.engine

FLOAT = {"dtype": "float32"}
PARAMS = {"max_new_tokens": ANSWER}


def ask(asked: list[Case], **options) -> dict:
    return {"prompts": [c.prompt for c in asked], "params": PARAMS, **options}


NO_OVERLAP = {"disable_overlap_schedule": True}
SNAPSHOTS = {"mamba_radix_cache_strategy": "extra_buffer"}


@pytest.mark.parametrize(
    ("options", "strategy"),
    [
        # The first is what a user gets without asking for anything.
        pytest.param({}, "extra_buffer", id="default", marks=needs_snapshots),
        pytest.param(NO_OVERLAP, "no_buffer", id="no overlap"),
        pytest.param(
            {**NO_OVERLAP, **SNAPSHOTS},
            "extra_buffer",
            id="no overlap but snapshots",
            marks=[needs_snapshots, pytest.mark.matrix],
        ),
    ],
)
@pytest.mark.parametrize("model", ["alpha", matrix("beta")])
def test_turns_and_shared_beginnings(run, model, options, strategy):
    """In one engine: five turns of twelve conversations, then a shared system prompt, alone and
    together, then the 200 prompts twice, when the second time finds the first's states."""
    talks = conversations(model, turns=5, count=12)
    shared = shared_beginnings(model, common=512, count=24)
    turns = [ask([t[i] for t in talks]) for i in range(5)]
    everything = {"prompts": [c.prompt for c in cases(model)]}
    steps = [*turns, ask(shared[:8], alone=True), ask(shared), everything, everything]
    answer = run(model, {**FLOAT, **options}, steps)
    result = answer["steps"]
    assert answer["options"]["mamba_radix_cache_strategy"] == strategy
    assert answer["options"]["disable_overlap_schedule"] is bool(options)
    assert answer["loop"] == ("normal" if options else "overlap")
    for i in range(5):
        assert_same(result[i], [t[i] for t in talks])
    assert_same(result[5], shared[:8])
    assert_same(result[6], shared)
    assert_same(result[7], cases(model))
    assert_same(result[8], cases(model))
    for i in range(1, 5):
        for out, talk in zip(result[i], talks, strict=True):
            said = len(talk[i - 1].prompt)
            assert out["cached"] >= (said - 1) // SNAPSHOT_GRID * SNAPSHOT_GRID
    assert hits(result[8]) > hits(result[7])
    if strategy == "extra_buffer":
        # The first of the shared prompts finds nothing, the second leaves what the third one finds.
        assert min(out["cached"] for out in result[5][2:]) >= 512 - SNAPSHOT_GRID
        assert hits(result[6]) == len(shared)


@pytest.mark.matrix
def test_off(run):
    """Nothing is ever found; the tokens are the same."""
    step = ask(shared_beginnings("alpha", common=512, count=24))
    shared = shared_beginnings("alpha", common=512, count=24)
    answer = run("alpha", {**FLOAT, "disable_radix_cache": True}, [step, step])
    assert answer["loop"] == "overlap"
    for outputs in answer["steps"]:
        assert_same(outputs, shared)
        assert hits(outputs) == 0


@needs_snapshots
@pytest.mark.parametrize(
    ("size", "mixed"), [matrix(16, False), (64, True), matrix(256, False), matrix(16, True)]
)
def test_chunked_prefill_with_cache(run, size, mixed):
    engine = {**FLOAT, "chunked_prefill_size": size, "enable_mixed_chunk": mixed}
    asked = [c for c in cases("alpha") if len(c.prompt) <= 40 * size]
    step = {"prompts": [c.prompt for c in asked]}
    result = run("alpha", engine, [step, step])["steps"]
    assert_same(result[0], asked)
    assert_same(result[1], asked)
    assert hits(result[1]) > 100


def branches(model: str) -> list[Case]:
    """Prompts that leave a 700-token one at every depth from 20 to 680, with 40 tokens of their own."""
    trunk = next(c.prompt for c in cases(model) if len(c.prompt) == 700)
    other = next(c.prompt for c in cases(model) if len(c.prompt) == 1000)
    asked = [trunk[:depth] + other[depth : depth + 40] for depth in range(20, 700, 33)]
    return [c for c in answered(model, asked) if clear(c)]


@needs_snapshots
@pytest.mark.parametrize("model", ["alpha", matrix("beta")])
def test_branches_in_the_middle_of_a_prompt(run, model):
    """The second that leaves at a depth finds the snapshot that the first left there, and so no more."""
    trunk = [c for c in cases(model) if len(c.prompt) == 700]
    asked = branches(model)
    assert len(asked) > 15
    steps = [{"prompts": [c.prompt for c in trunk]}, ask(asked, alone=True), ask(asked, alone=True)]
    result = run(model, FLOAT, steps)["steps"]
    assert_same(result[0], trunk)
    assert_same(result[1], asked)
    assert_same(result[2], asked)
    for out, case in zip(result[2], asked, strict=True):
        assert len(case.prompt) - 40 - SNAPSHOT_GRID <= out["cached"] < len(case.prompt)


@needs_snapshots
@pytest.mark.parametrize("interval", [matrix(None), 16])
@pytest.mark.parametrize("model", ["alpha", matrix("beta")])
def test_states_of_answers(run, model, interval):
    """A second turn begins in the middle of the first one's answer, with a state kept while decoding.

    By default one is kept at every 256th token, so the first turns end before that; or at every 16th.
    """
    rng, vocab = random.Random(5), vocabulary(model)
    place = interval or 256
    lengths = [place - 10 + i % 9 for i in range(24)] if interval is None else range(40, 64)
    first = [c for c in answered(model, [fresh_tokens(rng, vocab, n) for n in lengths]) if clear(c)]
    said = [c.prompt + c.expected.tokens for c in first]
    second = answered(model, [tokens + fresh_tokens(rng, vocab, 9) for tokens in said])
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if clear(b)]
    assert len(pairs) > 15
    options = {} if interval is None else {"mamba_track_interval": interval}
    steps = [ask([a for a, _ in pairs]), ask([b for _, b in pairs])]
    result = run(model, {**FLOAT, **options}, steps)["steps"]
    assert_same(result[0], [a for a, _ in pairs])
    assert_same(result[1], [b for _, b in pairs])
    # The answer's last token is not fed back, so there is no state after it.
    last = [(len(a.prompt) + ANSWER - 1) // place * place for a, _ in pairs]
    within = [i for i, (a, _) in enumerate(pairs) if last[i] > len(a.prompt)]
    assert len(within) > 8
    assert [result[1][i]["cached"] for i in within] == [last[i] for i in within]


@needs_snapshots  # a repeated prompt is not a whole request, whose answer it lacks
@pytest.mark.parametrize("dtype", ["float32", matrix("bfloat16")])
def test_a_hit_changes_no_logprob(run, dtype):
    """The same prompt, cold and from the cache: equal tokens, logprobs equal to rounding."""
    asked = shared_beginnings("alpha", common=256, count=16)
    step = {**ask(asked, alone=True), "params": {**PARAMS, "logprobs": 0}}
    cold, warm = run("alpha", {"dtype": dtype}, [step, step])["steps"]
    assert hits(warm) == len(asked)
    noise = BOUNDS["engine_logprob", getattr(torch, dtype)].atol
    for first, second in zip(cold, warm, strict=True):
        if dtype == "float32":
            assert first["tokens"] == second["tokens"]
        assert first["logprobs"][0] == pytest.approx(second["logprobs"][0], abs=noise)


@needs_snapshots
@pytest.mark.parametrize(
    "scarce",
    [
        matrix({"max_total_tokens": 2600}, id="tokens"),
        pytest.param({"max_mamba_cache_size": 48, "max_running_requests": 8}, id="states"),
    ],
)
def test_eviction_under_pressure(run, scarce):
    """Room for three of these prompts, or for few states: evicted all the time, and hits happen."""
    asked = [c for c in cases("alpha") if 96 <= len(c.prompt) <= 700]
    last = asked[-3:]
    order = [asked, last, last, asked, last, last]
    steps = [{"prompts": [c.prompt for c in some]} for some in order]
    engine = {**FLOAT, "context_length": 1024, **scarce}
    result = run("alpha", engine, steps)["steps"]
    for outputs, some in zip(result, order, strict=True):
        assert_same(outputs, some)
    assert hits(result[2]) > 0  # what came last is still there
    assert hits(result[5]) > 0
    assert hits(result[3]) < len(asked) / 2  # what came first is not
