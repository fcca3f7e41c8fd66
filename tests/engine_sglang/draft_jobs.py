"""What the tests of speculation run inside the child, beside the steps that all tests have."""

import random
from collections import Counter

import numpy as np

from sglang_model import cpu_speculation
from tests.engine_sglang import engine_jobs
from tests.engine_sglang.engine_jobs import as_list, describe, request, together


def guess_from(texts: list[list[int]], vocab: int):
    """A drafter that knows how texts go on, and errs at a random place of each draft, or nowhere.

    Every rank of an engine errs at the same places.
    """
    known = [np.array(text) for text in texts]

    def lookup(text: np.ndarray, longest: int, count: int) -> list[int]:
        rng = random.Random(int(text.sum()) + len(text))
        answer = next((k for k in known if np.array_equal(k[: len(text)], text)), text)
        drafts = [int(t) for t in answer[len(text) : len(text) + count]]
        drafts += [rng.randrange(vocab) for _ in range(count - len(drafts))]
        wrong = rng.randrange(count + 1)
        if wrong < count:
            drafts[wrong] = (drafts[wrong] + 1 + rng.randrange(vocab - 1)) % vocab
        return drafts

    return lookup


def generate(llm, prompts, params=None, adapters=None) -> dict:
    """Generates for every prompt: {"outputs", "confirmed": how often so many drafts of a step were}."""
    each = params if isinstance(params, list) else [params or {}] * len(prompts)
    requests = [request(**fields) for fields in each]
    if adapters is not None:
        pairs = zip(requests, adapters, strict=True)
        requests = [{**wanted, "lora_path": name} for wanted, name in pairs]
    outs = as_list(llm.generate(input_ids=prompts, **together(requests)))
    confirmed: Counter[int] = Counter()
    for out in outs:
        counts = out["meta_info"].get("spec_correct_drafts_histogram", [])  # none in one token
        for drafts, times in enumerate(counts):
            confirmed[drafts] += times
    outputs = [describe([out]) for out in outs]
    most = max(confirmed, default=-1)
    return {"outputs": outputs, "confirmed": [confirmed[i] for i in range(most + 1)]}


def run_engine(
    model: str,
    engine: dict,
    steps: list[dict],
    texts: list[list[int]] | None = None,
    vocab: int = 0,
) -> dict:
    """As in ``engine_jobs``, with the step "drafted"; drafts come from ``texts`` if they are given."""
    engine_jobs.STEPS |= {"drafted": generate}
    if texts is not None:
        cpu_speculation.lookup = guess_from(texts, vocab)
    return engine_jobs.run_engine(model, engine, steps)
