"""Drafts out of a text itself: what followed the last place where its present ending stood before."""

from __future__ import annotations

import numpy as np


def lookup(text: np.ndarray, longest: int, count: int) -> list[int]:
    """Guess how a text goes on.

    The longest ending that stood before counts, and of its places the last. The more of it, the surer the guess: there
    are one token fewer than stood before, since each costs a step the weights of other experts.

    Args:
        text: (T,) int tokens.
        longest: how much of the ending is looked for at most, tokens.
        count: drafts at most.

    Returns:
        Drafts; a text that repeats itself is taken to go on doing so.
    """
    if count < 1 or len(text) < 2:
        return []
    ends = np.flatnonzero(text[:-1] == text[-1])  # where a match ends
    matched = 1
    while matched < longest:
        earlier = ends[ends >= matched]
        earlier = earlier[text[earlier - matched] == text[-1 - matched]]
        if not earlier.size:
            break
        ends, matched = earlier, matched + 1
    if not ends.size or matched < 2:
        return []
    return np.resize(text[ends[-1] + 1 :], min(count, matched - 1)).tolist()
