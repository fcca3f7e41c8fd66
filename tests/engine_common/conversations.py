"""Prompts that have their beginning in common with others: conversations, shared system prompts."""

import random

from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.hf_reference import greedy
from tests.engine_common.prompts import fresh_tokens
from tests.engine_common.references import Case, vocabulary
from tests.tolerances import CLEAR_MARGIN

ANSWER = 12  # tokens


def answered(model: str, asked: list[list[int]]) -> list[Case]:
    answers = greedy(checkpoint(model), asked, ANSWER)
    return [Case(p, a) for p, a in zip(asked, answers, strict=True)]


def clear(case: Case) -> bool:
    return min(case.expected.margins) >= CLEAR_MARGIN


def conversations(model: str, turns: int, count: int) -> list[list[Case]]:
    """``count`` conversations, each a list of ``turns`` cases whose prompt is all that was said."""
    rng = random.Random(3)
    vocab = vocabulary(model)
    every = 2 * count  # some have an unclear turn and are left out
    asked = [fresh_tokens(rng, vocab, rng.randrange(90, 200)) for _ in range(every)]
    spoken: list[list[Case]] = [[] for _ in range(every)]
    for _ in range(turns):
        now = answered(model, asked)
        spoken = [[*s, c] for s, c in zip(spoken, now, strict=True)]
        asked = [
            c.prompt + c.expected.tokens + fresh_tokens(rng, vocab, rng.randrange(5, 80))
            for c in now
        ]
    kept = [s for s in spoken if all(clear(c) for c in s)][:count]
    assert len(kept) == count
    return kept


def shared_beginnings(model: str, common: int, count: int) -> list[Case]:
    """Prompts with the same first ``common`` tokens and 1 to 150 of their own."""
    rng = random.Random(4)
    vocab = vocabulary(model)
    system = fresh_tokens(rng, vocab, common)
    asked = [system + fresh_tokens(rng, vocab, rng.randrange(1, 150)) for _ in range(2 * count)]
    return [c for c in answered(model, asked) if clear(c)][:count]


def hits(outputs: list[dict]) -> int:
    """How many requests found something in the prefix cache."""
    return sum(out["cached"] > 0 for out in outputs)
