"""n-gram speculation: drafts are confirmed or not, and the tokens are those of the model alone."""

import math
from itertools import pairwise

import pytest
import torch

from sglang_model.engine_api import platforms_bring_workers
from tests.engine_common.adapters import ATTENTION, CONV, EXPERTS, MLP, adapter
from tests.engine_common.checkpoints import altered, checkpoint
from tests.engine_common.conversations import conversations
from tests.engine_common.hf_reference import greedy, load
from tests.engine_common.references import (
    NEW_TOKENS,
    Case,
    assert_bf16,
    assert_same,
    cases,
    vocabulary,
)
from tests.tiers import matrix
from tests.tolerances import BOUNDS, CLEAR_MARGIN

pytestmark = pytest.mark.engine
needs_worker = pytest.mark.skipif(
    not platforms_bring_workers(), reason="SGLang 0.5.22 has no drafts on a CPU; it is refused"
)

FLOAT = {"dtype": "float32"}
NOISE = BOUNDS["engine_logprob", torch.float32].atol


def ngram(tokens: int | None = 4) -> dict:
    """Options for steps of so many tokens a request: its last one and drafts."""
    count = {} if tokens is None else {"speculative_num_draft_tokens": tokens}
    return {**FLOAT, "speculative_algorithm": "NGRAM", **count}


@pytest.fixture(scope="module")
def drafted(server):
    """As ``run``, with the step of ``draft_jobs``; drafts are made of ``texts`` where these are given."""

    def outcome(model, engine: dict, steps: list[dict], **options):
        folder = str(checkpoint(model) if isinstance(model, str) else model)
        return server.run(
            "draft_jobs:run_engine", model=folder, engine=engine, steps=steps, **options
        )

    def start(*args, **options) -> dict:
        return outcome(*args, **options).get()

    start.outcome = outcome
    return start


def knowing(model: str, asked) -> dict:
    """Arguments of ``drafted``: drafts from the right answers, with an error somewhere."""
    texts = [c.prompt + c.expected.tokens for c in asked]
    return {"texts": texts, "vocab": vocabulary(model)}


def ask(asked, **options) -> dict:
    return {"op": "drafted", "prompts": [c.prompt for c in asked], **options}


@needs_worker
@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        matrix("alpha", 2),
        ("alpha", 4),
        matrix("alpha", 8),
        matrix("beta", 3),
        matrix("beta", 7),
        matrix("demo", 5),
    ],
)
def test_any_number_of_drafts_is_confirmed(drafted, model, tokens):
    """64 requests run together, then one at a time: 8 drafts are more than 64 requests may have."""
    asked = cases(model)
    engine = {**ngram(tokens), "max_running_requests": 16, "disable_radix_cache": True}
    steps = [ask(asked), *[ask([case]) for case in asked[:12]]]
    result = drafted(model, engine, steps, **knowing(model, asked))
    together, *alone = result["steps"]
    assert_same(together["outputs"], asked)
    for case, step in zip(asked, alone, strict=False):
        assert_same(step["outputs"], [case])
    reachable = min(tokens, 64 // 16)
    assert all(count > 20 for count in together["confirmed"][:reachable])
    assert len(together["confirmed"]) <= tokens
    assert sum(step["confirmed"][-1] for step in alone if len(step["confirmed"]) == tokens) > 3
    assert result["loop"] == "normal"


@needs_worker
def test_drafts_out_of_the_text(drafted):
    """What users get by the algorithm's name alone, on a model that copies much of its prompts.

    With 64 requests at once there is nothing to gain by drafts, and none are made.
    """
    asked = cases("demo")
    for together, share in ((4, 0.1), (64, 0)):
        engine = {**ngram(None), "max_running_requests": together}
        (step,) = drafted("demo", engine, [ask(asked)])["steps"]
        assert_same(step["outputs"], asked)
        confirmed = sum(n * times for n, times in enumerate(step["confirmed"]))
        assert confirmed > share * NEW_TOKENS * len(asked) or not (share or confirmed)


@needs_worker
@pytest.mark.parametrize("model", [matrix("alpha"), "beta"])
def test_turns_find_what_drafts_left_in_the_prefix_cache(drafted, model):
    talks = conversations(model, turns=4, count=12)
    turns = [[t[i] for t in talks] for i in range(4)]
    every = [case for turn in turns for case in turn]
    length = len(every[0].expected.tokens)
    steps = [ask(turn, params={"max_new_tokens": length}) for turn in turns]
    result = drafted(model, ngram(4), steps, **knowing(model, every))["steps"]
    for turn, step in zip(turns, result, strict=True):
        assert_same(step["outputs"], turn)
    for before, turn in pairwise(result):
        assert len(before["confirmed"]) == 4
        assert all(out["cached"] > 0 for out in turn["outputs"])


@needs_worker
@pytest.mark.parametrize("known", [True, matrix(False)], ids=["drafts", "hardly any drafts"])
def test_snapshots_while_decoding(drafted, known):
    """What follows a long answer starts from a snapshot within it, taken among drafts or in a plain step."""
    folder, every = checkpoint("alpha"), 16
    prompts = [c.prompt for c in cases("alpha") if 20 <= len(c.prompt) <= 200][:24]
    talks = greedy(folder, prompts, 3 * NEW_TOKENS)
    said = [p + a.tokens for p, a in zip(prompts, talks, strict=True)]
    nexts = [text + prompts[i - 1][:5] for i, text in enumerate(said)]
    pairs = zip(prompts, talks, nexts, greedy(folder, nexts, NEW_TOKENS), strict=True)
    kept = [
        (Case(p, talk), Case(following, answer))
        for p, talk, following, answer in pairs
        if min(*talk.margins, *answer.margins) >= CLEAR_MARGIN
    ]
    assert len(kept) > 12
    first, second = (list(side) for side in zip(*kept, strict=True))
    steps = [ask(first, params={"max_new_tokens": 3 * NEW_TOKENS}), ask(second)]
    engine = {**ngram(4), "mamba_track_interval": every, "max_running_requests": 8}
    texts = knowing("alpha", [*first, *second]) if known else {}
    result = drafted("alpha", engine, steps, **texts)["steps"]
    assert_same(result[0]["outputs"], first)
    assert_same(result[1]["outputs"], second)
    for out, case in zip(result[1]["outputs"], first, strict=True):
        end = len(case.prompt) + 3 * NEW_TOKENS
        assert out["cached"] >= (end - 1) // every * every - every
        assert out["cached"] > len(case.prompt)


@needs_worker
@pytest.mark.matrix
def test_chunked_prefill(drafted):
    asked = cases("alpha")
    engine = {**ngram(4), "chunked_prefill_size": 48}
    result = drafted("alpha", engine, [ask(asked), ask(asked)], **knowing("alpha", asked))["steps"]
    assert_same(result[0]["outputs"], asked)
    assert_same(result[1]["outputs"], asked)


@needs_worker
def test_retracted_requests_answer_the_same(drafted, tmp_path):
    """As in test_preemption, with drafts."""
    folder = altered(checkpoint("alpha"), tmp_path / "endless", config={"eos_token_id": 100_000})
    (folder / "generation_config.json").unlink()
    prompts = [c.prompt for c in cases("alpha") if 5 <= len(c.prompt) <= 64]
    pairs = zip(prompts, greedy(checkpoint("alpha"), prompts, 96), strict=True)
    asked = [Case(p, a) for p, a in pairs if min(a.margins) >= CLEAR_MARGIN]
    lengths = [96 if i % 2 else NEW_TOKENS + i % 80 for i in range(len(asked))]
    params = [{"ignore_eos": False, "max_new_tokens": n} for n in lengths]
    engine = {**ngram(4), "context_length": 256, "max_total_tokens": 1600}
    reckless = {
        "SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR": "0",
        "SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS": "2",
    }
    known = knowing("alpha", asked)
    (step,) = drafted(folder, engine, [ask(asked, params=params)], env=reckless, **known)["steps"]
    assert sum(out["retractions"] for out in step["outputs"]) > 5
    assert_same(step["outputs"], asked)


@needs_worker
def test_to_the_end_of_the_context(drafted):
    """Texts that become as long as may be, beside others that don't."""
    asked = [c for c in cases("alpha") if len(c.prompt) == 95][:2]
    asked += [c for c in cases("alpha") if len(c.prompt) < 60][:6]
    engine = {**ngram(8), "context_length": 95 + NEW_TOKENS}
    result = drafted("alpha", engine, [ask(asked)], **knowing("alpha", asked))
    assert_same(result["steps"][0]["outputs"], asked)


@needs_worker
def test_stops_within_drafts(drafted):
    asked = list(cases("alpha")[:60])
    stops = [c.expected.tokens[i % NEW_TOKENS] for i, c in enumerate(asked)]
    params = [{"stop_token_ids": [token], "ignore_eos": False} for token in stops]
    engine = {**ngram(5), "max_running_requests": 8}
    (step,) = drafted("alpha", engine, [ask(asked, params=params)], **knowing("alpha", asked))[
        "steps"
    ]
    within = 0
    for out, case, stop in zip(step["outputs"], asked, stops, strict=True):
        want = case.expected.tokens
        assert out["tokens"] == want[: len(out["tokens"])]
        assert out["stop"] == out["tokens"][-1]
        assert len(out["tokens"]) <= want.index(stop) + 1
        within += out["stop"] == stop
    assert within > 40  # some meet the model's own end first
    assert len(step["confirmed"]) == 5


@needs_worker
@pytest.mark.parametrize(
    "options",
    [{}, matrix({"disable_overlap_schedule": True})],
    ids=["snapshots", "running states"],
)
def test_what_a_stop_within_drafts_leaves(drafted, options):
    """Drafts that stood behind a stop are in no text that the prefix cache knows."""
    folder = checkpoint("alpha")
    first = [c for c in cases("alpha") if 20 <= len(c.prompt) <= 200][:40]
    said = [c.prompt + c.expected.tokens[:6] for c in first]
    nexts = [text + first[i - 1].prompt[:4] for i, text in enumerate(said)]
    second = [Case(p, a) for p, a in zip(nexts, greedy(folder, nexts, NEW_TOKENS), strict=True)]
    second = [c for c in second if min(c.expected.margins) >= CLEAR_MARGIN]
    assert len(second) > 25
    stops = [{"stop_token_ids": [c.expected.tokens[5]], "ignore_eos": False} for c in first]
    engine = {**ngram(5), "mamba_track_interval": 6, "max_running_requests": 8, **options}
    known = knowing("alpha", [*first, *second])
    steps = [ask(first, params=stops), ask(second)]
    result = drafted("alpha", engine, steps, **known)["steps"]
    assert_same(result[1]["outputs"], second)
    assert sum(out["cached"] > 0 for out in result[1]["outputs"]) > 10


@needs_worker
def test_logprobs(drafted):
    asked = cases("alpha")[:60]
    step = ask(asked, params={"logprobs": 3})
    (result,) = drafted("alpha", ngram(4), [step], **knowing("alpha", asked))["steps"]
    assert_same(result["outputs"], asked)
    for out, case in zip(result["outputs"], asked, strict=True):
        assert out["logprobs"] == pytest.approx(case.expected.logprobs, abs=NOISE)
        for token, logprob, best in zip(out["tokens"], out["logprobs"], out["top"], strict=True):
            assert len(best) == 3
            assert best[str(token)] == logprob


@needs_worker
@pytest.mark.matrix
def test_bfloat16(drafted):
    step = ask(cases("demo"), params={"logprobs": 0})
    (result,) = drafted("demo", {**ngram(None), "dtype": "bfloat16"}, [step])["steps"]
    assert_bf16("demo", result["outputs"])
    assert len(result["confirmed"]) > 2


@needs_worker
@pytest.mark.matrix
def test_samples_follow_the_distribution(drafted):
    """The second of two sampled tokens, where the first is the likeliest, against transformers."""
    case = cases("alpha")[40]
    first = case.expected.tokens[0]
    with torch.inference_mode():
        model = load(checkpoint("alpha"), torch.float32)
        exact = model(torch.tensor([[*case.prompt, first]])).logits[0, -1].softmax(-1)
    hot = {"temperature": 1.0, "max_new_tokens": 3}
    step = ask([case] * 3000, params=hot)
    (result,) = drafted("alpha", ngram(3), [step], **knowing("alpha", [case]))["steps"]
    seconds = [out["tokens"][1] for out in result["outputs"] if out["tokens"][0] == first]
    assert len(seconds) > 200
    assert all(count > 20 for count in result["confirmed"][:2])
    for token in exact.topk(6).indices.tolist():
        share = exact[token].item()
        deviation = math.sqrt(share * (1 - share) / len(seconds))
        found = seconds.count(token) / len(seconds)
        assert found == pytest.approx(share, abs=4 * deviation + 1 / len(seconds))


@needs_worker
@pytest.mark.matrix
def test_penalties(drafted):
    """Requests whose next token depends on the last ones otherwise than through the model.

    As without speculation in the same scheduler; the overlapping one counts tokens a step late.
    """
    asked = cases("demo")[:40]
    fields = [{"frequency_penalty": 0.7}, {"repetition_penalty": 1.2}, {"presence_penalty": 0.9}]
    params = [{**fields[i % 3], "ignore_eos": False} for i in range(len(asked))]
    step = {"prompts": [c.prompt for c in asked], "params": params}
    plain = drafted("demo", {**FLOAT, "disable_overlap_schedule": True}, [step])["steps"][0]
    engine = {**ngram(4), "max_running_requests": 8}
    ours = drafted("demo", engine, [dict(step)])["steps"][0]
    assert [out["tokens"] for out in ours] == [out["tokens"] for out in plain]


@needs_worker
def test_grammars(drafted):
    """Requests with a grammar have no drafts; those beside them, before and after, may."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    asked = cases("demo")[:24]
    params = [
        {"json_schema": schema, "max_new_tokens": 24} if i % 12 == 5 else {} for i in range(24)
    ]
    step = {"prompts": [c.prompt for c in asked], "params": params}
    engine = {"skip_tokenizer_init": False, "max_running_requests": 4}
    plain = drafted("demo", {**FLOAT, **engine}, [step])["steps"][0]
    ours = drafted("demo", {**ngram(4), **engine}, [dict(step)])["steps"][0]
    assert [out["tokens"] for out in ours] == [out["tokens"] for out in plain]
    free = [out for i, out in enumerate(ours) if i % 12 != 5]
    assert_same(free, [c for i, c in enumerate(asked) if i % 12 != 5])


@needs_worker
def test_adapters(drafted):
    """Drafts of requests with an adapter, beside others of the base model."""
    folder, merged = adapter("alpha", ATTENTION + CONV + MLP, EXPERTS)
    asked = [c.prompt for c in cases("alpha")[:60]]
    answers = greedy(merged, asked, NEW_TOKENS)
    pairs = zip(asked, answers, strict=True)
    adapted = [Case(p, a) for p, a in pairs if min(a.margins) >= CLEAR_MARGIN]
    base = list(cases("alpha")[: len(adapted)])
    mixed = [case for pair in zip(adapted, base, strict=True) for case in pair]
    engine = {**ngram(4), "lora_paths": [f"all={folder}"], "max_running_requests": 16}
    step = ask(mixed, adapters=["all", None] * len(base))
    (result,) = drafted("alpha", engine, [step], **knowing("alpha", mixed))["steps"]
    assert_same(result["outputs"], mixed)
    assert len(result["confirmed"]) == 4


@needs_worker
@pytest.mark.matrix
def test_tensor_parallel(drafted):
    asked = cases("alpha")[:80]
    two = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    engine = {**ngram(4), "tp_size": 2}
    known = knowing("alpha", asked)
    (result,) = drafted("alpha", engine, [ask(asked)], env=two, timeout=400, **known)["steps"]
    assert_same(result["outputs"], asked)
    assert len(result["confirmed"]) == 4


REFUSED = {
    "tree": (
        {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 4},
        "--speculative-ngram-max-bfs-breadth 4 asks for drafts in a tree; on a CPU they are a chain",
    ),
    "corpus": (
        {
            "speculative_algorithm": "NGRAM",
            "speculative_ngram_external_corpus_path": "x",
            "speculative_ngram_external_sam_budget": 1,
        },
        "--speculative-ngram-external-corpus-path can't be served on a CPU",
    ),
    "model": (
        {
            "speculative_algorithm": "EAGLE",
            "speculative_draft_model_path": str(checkpoint("alpha")),
        },
        "EAGLE speculative decoding is not supported by PortableCpuPlatform",
    ),
}


@needs_worker
@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_serving(drafted, name):
    engine, message = REFUSED[name]
    refused = drafted.outcome("alpha", engine, [])
    assert refused.error is not None
    assert message in refused.log + refused.error


@pytest.mark.skipif(platforms_bring_workers(), reason="SGLang 0.5.23 has drafts on a CPU")
def test_refused_by_an_older_release(drafted):
    refused = drafted.outcome("alpha", ngram(4), [])
    assert refused.error is not None
    assert (
        "n-gram speculation on a CPU needs SGLang 0.5.23; this is 0.5.22"
        in refused.log + refused.error
    )
