"""LoRA adapters on the experts of a layer: what an engine hands the op, and the difference that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.nn import functional as F

Factors: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""A (E, r, columns) and B (E, rows, r) like the activations: each expert's weight gains ``B @ A``.

B has the adapter's scaling in it. A factor that all experts share has a first dimension of 1.
"""


@dataclass(frozen=True)
class ExpertAdapter:
    """One adapter's factors for the experts of a layer, and the tokens that use it.

    Attributes:
        tokens: (T,) bool.
        w13: factors over D; one pair with 2 * F rows, or one with F rows for w1 and one for w3.
        w2: factors over F with D rows.
    """

    tokens: torch.Tensor
    w13: Sequence[Factors]
    w2: Sequence[Factors]

    def add_w13(self, out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, expert: int) -> None:
        """Add this adapter's part to what an expert made of some tokens.

        Args:
            out: (n, 2F), changed in place.
            x: (n, D).
            rows: (n,) which of the T tokens they are.
            expert: which expert it was.
        """
        self._add(self.w13, out, x, rows, expert)

    def add_w2(self, out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, expert: int) -> None:
        """The same for ``out`` (n, D) of ``x`` (n, F)."""
        self._add(self.w2, out, x, rows, expert)

    def _add(
        self,
        factors: Sequence[Factors],
        out: torch.Tensor,
        x: torch.Tensor,
        rows: torch.Tensor,
        expert: int,
    ) -> None:
        chosen = self.tokens[rows].nonzero().squeeze(1)
        if not chosen.numel():
            return
        added = [F.linear(F.linear(x[chosen], _of(a, expert)), _of(b, expert)) for a, b in factors]
        out[chosen] += torch.cat(added, dim=-1)


def _of(factor: torch.Tensor, expert: int) -> torch.Tensor:
    return factor[expert % len(factor)]
