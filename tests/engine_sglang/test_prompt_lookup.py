"""Drafts out of a text, against the rule read literally."""

import random

import numpy as np
import pytest

from sglang_model.prompt_lookup import lookup


def slowly(text: list[int], longest: int, count: int) -> list[int]:
    """The longest ending (up to ``longest``, of two tokens at least) that stood before, its last place."""
    for length in range(min(longest, len(text) - 1), 1, -1):
        for start in reversed(range(len(text) - length)):
            if text[start : start + length] == text[-length:]:
                drafts, period = [], text[start + length :]
                while len(drafts) < min(count, length - 1):
                    drafts.append(period[len(drafts) % len(period)])
                return drafts
    return []


@pytest.mark.parametrize("vocab", [1, 2, 4, 8])
def test_against_the_rule(vocab):
    rng = random.Random(vocab)
    found = 0
    for _ in range(400):
        text = [rng.randrange(vocab) for _ in range(rng.randrange(1, 40))]
        longest, count = rng.randrange(2, 8), rng.randrange(0, 6)
        drafts = lookup(np.array(text), longest, count)
        assert drafts == slowly(text, longest, count), text
        found += bool(drafts)
    assert found > 30


def test_a_copy_goes_on():
    text = [5, 1, 2, 3, 4, 6, 7, 9, 1, 2, 3]
    assert lookup(np.array(text), 18, 8) == [4, 6]
    assert lookup(np.array(text), 18, 1) == [4]
    assert lookup(np.array(text), 2, 8) == [4]
    assert lookup(np.array([*text, 8]), 18, 8) == []
