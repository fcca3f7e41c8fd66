"""What users ask of an engine beside greedy tokens: n, logprobs, stops, aborts, structured output."""

import pytest
import torch

from tests.engine_common import sampling_checks
from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.hf_reference import load
from tests.engine_common.references import Case, assert_same, cases
from tests.tiers import matrix
from tests.tolerances import BOUNDS

pytestmark = pytest.mark.engine

NOISE = BOUNDS["engine_logprob", torch.float32].atol
ENGINE = {"dtype": "float32"}
# Under a grammar the demo model would go on with spaces for as long as it may.
WITH_TEXT = {
    **ENGINE,
    "skip_tokenizer_init": False,
    "constrained_json_disable_any_whitespace": True,
}
END = 2  # the random checkpoints' end of text


@pytest.fixture(scope="module")
def asked() -> tuple[Case, ...]:
    """The prompt that is sampled from, then those that are answered greedily beside it."""
    return cases("alpha")[40:71]


@pytest.fixture(scope="module")
def distributions(asked) -> list[torch.Tensor]:
    """For each prompt (T, V) log-probabilities of the tokens that follow, in transformers, float32."""
    model = load(checkpoint("alpha"), torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([c.prompt])).logits[0].log_softmax(-1) for c in asked]


@pytest.fixture(scope="module")
def sampled(run, asked):
    """One engine for the tests that need no text."""
    many = {"n": 8, "temperature": 1.0, "max_new_tokens": 12}
    frequencies = {"n": 400, "temperature": 1.0, "max_new_tokens": 1}
    prompts = [c.prompt for c in asked]
    stops = [{"stop_token_ids": [c.expected.tokens[5]], "ignore_eos": False} for c in asked]
    steps = [
        {"prompts": prompts, "params": [many, *[{"n": 8}] * len(prompts[1:])]},
        {"prompts": prompts[:1], "params": frequencies},
        {"prompts": prompts, "params": {"logprobs": 5, "prompt_logprobs": True}},
        {"prompts": prompts, "params": stops},
    ]
    return run("alpha", ENGINE, steps)["steps"]


def test_n_completions_differ_where_they_are_sampled(sampled, asked):
    drawn = [c["tokens"] for c in sampled[0][0]["all"]]
    assert len(drawn) == 8
    assert len({tuple(t) for t in drawn}) > 4
    for place in range(8):  # greedy ones beside them are all the reference's
        assert_same([out["all"][place] for out in sampled[0][1:]], asked[1:])


def test_samples_follow_the_distribution(sampled, distributions):
    """400 first tokens against transformers' probabilities, within four standard deviations."""
    exact = distributions[0][-1].exp()
    assert len(sampled[1][0]["all"]) == 400
    sampling_checks.first_tokens_follow(exact, sampled[1][0]["all"])


def test_logprobs_are_transformers_own(sampled, asked, distributions):
    for out, case, exact in zip(sampled[2], asked, distributions, strict=True):
        assert out["logprobs"] == pytest.approx(case.expected.logprobs, abs=NOISE)
        first = exact[-1].topk(5)
        want = dict(zip(map(str, first.indices.tolist()), first.values.tolist(), strict=True))
        assert out["top"][0] == pytest.approx(want, abs=NOISE)
        of_prompt = exact[:-1].gather(1, torch.tensor(case.prompt[1:])[:, None])[:, 0]
        assert out["prompt_logprobs"][0] is None  # nothing comes before it
        assert out["prompt_logprobs"][1:] == pytest.approx(of_prompt.tolist(), abs=NOISE)


def test_stop_tokens_end_the_answer(sampled, asked):
    for out, case in zip(sampled[3], asked, strict=True):
        stop = next(t for t in case.expected.tokens if t in (case.expected.tokens[5], END))
        end = case.expected.tokens.index(stop)
        assert out["tokens"] == case.expected.tokens[: end + 1]
        assert (out["finish"], out["stop"]) == ("stop", stop)


@pytest.mark.parametrize("cache", [True, matrix(False)], ids=["cache", "no cache"])
def test_abort_in_flight(server, cache):
    """Half of 64 requests leave after four tokens; the others and a second try answer as ever."""
    asked = list(cases("alpha")[:64])
    aborted = list(range(0, 64, 2))
    result = server.run(
        "async_jobs:abort_in_flight",
        model=str(checkpoint("alpha")),
        engine={**ENGINE, "disable_radix_cache": not cache},
        prompts=[c.prompt for c in asked],
        aborted=aborted,
        after=4,
    ).get()
    left = [c for i, c in enumerate(asked) if i not in aborted]
    assert_same([{"tokens": t} for t in result["finished"]], left)
    assert_same([{"tokens": t} for t in result["again"]], [asked[i] for i in aborted])
    assert sum(len(t) < 16 for t in result["partial"]) == len(aborted)
    assert set(result["reasons"]) == {"abort"}
    assert result["unfinished"] == 0


@pytest.fixture(scope="module")
def texts(run):
    """Free answers, the same with stop strings, and half of them under a JSON schema."""
    return sampling_checks.texts_of(
        lambda steps: run("demo", WITH_TEXT, steps)["steps"], length="max_new_tokens"
    )


def test_stop_strings_cut_the_text(texts):
    sampling_checks.stop_strings_cut_the_text(texts)


def test_structured_output_beside_free_answers(texts):
    sampling_checks.structured_output_beside_free_answers(texts)


def test_requests_of_one_token_and_of_the_full_length(run):
    """The shortest prompt, one output token; and prompt and answer that fill the model's length."""
    long = max(cases("alpha"), key=lambda c: len(c.prompt))
    assert len(long.prompt) == 2000
    short = cases("alpha")[0]
    steps = [
        {"prompts": [short.prompt], "params": {"max_new_tokens": 1}},
        {"prompts": [long.prompt], "params": {"max_new_tokens": 16}},
    ]
    engine = {**ENGINE, "context_length": len(long.prompt) + 16}
    result = run("alpha", engine, steps)["steps"]
    assert_same(result[0], [Case(short.prompt, short.expected)])
    assert_same(result[1], [long])
