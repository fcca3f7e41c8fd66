"""What users ask of an engine beside greedy tokens: n, logprobs, stops, aborts, structured output."""

import pytest
import torch

from tests.engine_common import sampling_checks
from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.hf_reference import load
from tests.engine_common.references import Case, assert_same, cases
from tests.tolerances import BOUNDS

pytestmark = pytest.mark.engine

NOISE = BOUNDS["engine_logprob", torch.float32].atol
ENGINE = {"dtype": "float32", "enable_prefix_caching": True}
# Under a grammar the demo model would go on with spaces for as long as it may.
COMPACT_GRAMMAR = {"backend": "xgrammar", "disable_any_whitespace": True}
WITH_TEXT = {
    **ENGINE,
    "skip_tokenizer_init": False,
    "structured_outputs_config": COMPACT_GRAMMAR,
}


def distribution(folder, prompt: list[int]) -> torch.Tensor:
    """(V,) log-probabilities of the next token in transformers, float32."""
    with torch.inference_mode():
        return load(folder, torch.float32)(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)


@pytest.fixture(scope="module")
def sampled(run):
    """One engine for the tests that need no text."""
    prompt = cases("alpha")[40].prompt
    many = {"n": 8, "temperature": 1.0, "seed": 5, "max_tokens": 12}
    frequencies = {"n": 400, "temperature": 1.0, "seed": 6, "max_tokens": 1}
    greedy = {"prompts": [c.prompt for c in cases("alpha")[:30]], "params": {"logprobs": 5}}
    beside = {
        "prompts": [prompt, *greedy["prompts"]],
        "params": [many, *[{}] * len(greedy["prompts"])],
    }
    steps = [
        {"prompts": [prompt], "params": many},
        beside,
        {"prompts": [prompt], "params": frequencies},
        greedy,
    ]
    return run("alpha", ENGINE, steps)["steps"]


def test_n_completions_are_seeded_and_differ(sampled):
    alone = [c["tokens"] for c in sampled[0][0]["all"]]
    assert len(alone) == 8
    assert len({tuple(t) for t in alone}) > 4
    assert [c["tokens"] for c in sampled[1][0]["all"]] == alone  # whoever runs beside it
    assert_same(sampled[1][1:], cases("alpha")[:30])


def test_samples_follow_the_distribution(sampled):
    """400 first tokens against transformers' probabilities, within four standard deviations."""
    exact = distribution(checkpoint("alpha"), cases("alpha")[40].prompt).exp()
    sampling_checks.first_tokens_follow(exact, sampled[2][0]["all"])


def test_logprobs_are_transformers_own(sampled):
    for out, case in zip(sampled[3], cases("alpha")[:30], strict=True):
        assert out["logprobs"] == pytest.approx(case.expected.logprobs, abs=NOISE)
        first = distribution(checkpoint("alpha"), case.prompt).topk(5)
        want = dict(zip(map(str, first.indices.tolist()), first.values.tolist(), strict=True))
        assert out["top"][0] == pytest.approx(want, abs=NOISE)


def test_abort_in_flight(server):
    """Half of 64 requests leave after four tokens; the others and a second try answer as ever."""
    asked = list(cases("alpha")[:64])
    aborted = list(range(0, 64, 2))
    result = server.run(
        "async_jobs:abort_in_flight",
        model=str(checkpoint("alpha")),
        engine=ENGINE,
        prompts=[c.prompt for c in asked],
        aborted=aborted,
        after=4,
        env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    ).get()
    left = [c for i, c in enumerate(asked) if i not in aborted]
    assert_same([{"tokens": t} for t in result["finished"]], left)
    assert_same([{"tokens": t} for t in result["again"]], [asked[i] for i in aborted])
    assert sum(len(t) < 16 for t in result["partial"]) == len(aborted)
    assert result["unfinished"] == 0


@pytest.fixture(scope="module")
def texts(run):
    """Free answers, the same with stop strings, and half of them under a JSON schema."""
    return sampling_checks.texts_of(
        lambda steps: run("demo", WITH_TEXT, steps)["steps"], length="max_tokens"
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
        {"prompts": [short.prompt], "params": {"max_tokens": 1}},
        {"prompts": [long.prompt], "params": {"max_tokens": 16}},
    ]
    engine = {**ENGINE, "max_model_len": len(long.prompt) + 16}
    result = run("alpha", engine, steps)["steps"]
    assert_same(result[0], [Case(short.prompt, short.expected)])
    assert_same(result[1], [long])
