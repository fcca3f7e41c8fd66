"""The short convolution of drafts that form a tree; which of them stand is decided later, so each one leaves a state.

Draft t of a sequence sees the K - 1 values before it on its own branch, and beyond the root the sequence's state. A
chain is the tree in which each draft follows the one before; there this is the operator on a decode of q tokens. One
code for every device: nothing is read back, and shapes depend on nothing but S and q, so a CUDA graph can capture it.
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


def short_conv_drafts(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor,
    seen: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve the drafts of a step.

    Args:
        bcx: (S * q, 3 * D), rows [B, C, x] as in_proj makes them, sequence after sequence.
        weight: (D, K).
        bias: (D,) or None.
        history: (S, D, K - 1) states of the sequences; not changed.
        seen: (S, q, K) of :func:`branches`.

    Returns:
        (S * q, D) like bcx, and for each draft the state (S, q, D, K - 1) if it is the last that stands, like history.
    """
    D, K = weight.shape
    S, q, _ = seen.shape
    B, C, x = bcx.split(D, dim=-1)
    values = torch.cat([history.transpose(1, 2).to(bcx.dtype), (B * x).view(S, q, D)], dim=1)
    lines = torch.arange(S, device=bcx.device)[:, None]
    taps = weight.t().float()
    # The newest value first, as in native.py, so that a chain gives the same numbers to the bit.
    total = values[:, K - 1 :].float() * taps[K - 1]
    for k in reversed(range(K - 1)):
        total.addcmul_(values[lines, seen[:, :, k]].float(), taps[k])
    if bias is not None:
        total += bias.float()
    states = values[lines[:, None], seen[:, :, 1:]].to(history.dtype)
    return C * total.to(bcx.dtype).view(S * q, D), states.transpose(2, 3)
