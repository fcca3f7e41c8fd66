"""Trees of drafts: which drafts and which values of its sequence's history each one sees.

One code for every device: nothing is read back, and shapes depend on nothing but S and q, so a CUDA graph can capture
it.
"""

from __future__ import annotations

import torch


def chain(sequences: int, drafts: int, device: torch.device) -> torch.Tensor:
    """Predecessors (S, q) of drafts that follow one another."""
    return torch.arange(-1, drafts - 1, device=device).expand(sequences, drafts)


def tree(first_child: torch.Tensor, next_sibling: torch.Tensor) -> torch.Tensor:
    """Predecessors (S, q) of drafts whose tree is given by links, (S, q) int64 each; -1 where a draft has none."""
    S, q = first_child.shape
    before = first_child.new_full((S, q + 1), -1)  # the last column takes what links to nothing
    for t in range(q):
        child, sibling = first_child[:, t, None], next_sibling[:, t, None]
        before.scatter_(1, torch.where(child < 0, q, child), t)
        before.scatter_(1, torch.where(sibling < 0, q, sibling), before[:, t, None].clone())
    return before[:, :q]


def branches(predecessors: torch.Tensor, width: int) -> torch.Tensor:
    """What each draft sees, for all layers of a step.

    Args:
        predecessors: (S, q) int64, for each draft an earlier draft of its sequence; -1 for the root, which comes first.
        width: K.

    Returns:
        (S, q, K) int64 places among the sequence's K - 1 values of history, oldest first, and its q drafts; the draft
        itself last.
    """
    S, q = predecessors.shape
    history = width - 1
    before = torch.arange(-1, history - 1, device=predecessors.device).expand(S, history)
    # Before the root (-1) comes the newest value of history, whose place is history - 1.
    before = torch.cat([before, predecessors + history], dim=1)
    places = [torch.arange(history, history + q, device=predecessors.device).expand(S, q)]
    for _ in range(history):
        places.append(before.gather(1, places[-1]))
    return torch.stack(places[::-1], dim=-1)
