"""What is measured: prompts, batch sizes and lengths, whatever the engine.

A workload is measured in *turns*. One turn of a prefill, a mixed or a uniform workload runs its
requests to the end. A decode workload is prepared once (its prompts are prefilled, which is not timed) and each
turn then times a number of further decode steps of the same sequences, so that a long context is
paid for once and not once a turn; engines that run on by themselves between turns (their scheduler
lives in another process) prefill anew each turn instead.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

Kind = Literal["prefill", "decode", "mixed", "uniform"]


@dataclass(frozen=True)
class Request:
    """One sequence: ``prompt`` token ids and how many tokens to generate after it."""

    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """One row of the result table.

    Attributes:
        name: what it is called in tables.
        kind: which phase is timed; see the module's text.
        batch: sequences (mixed, uniform: requests in all).
        context: tokens of each prompt (mixed: the longest).
        steps: timed decode steps a turn (mixed: the longest answer; uniform: each answer; prefill: prompts one after
            another).
    """

    name: str
    kind: Kind
    batch: int
    context: int
    steps: int

    def requests(self, turn: int, vocab_size: int, room: int = 0) -> list[Request]:
        """The requests of one turn: the same for both sides, and other prompts every turn.

        Args:
            turn: number of the turn; prompts of different turns share no prefix, so no cache
                answers them.
            vocab_size: ids are drawn from ``16 .. vocab_size - 1``, clear of the special tokens.
            room: decode only, tokens to generate beyond one turn's.
        """
        rng = random.Random(f"{self.name}/{turn}")

        def prompt(length: int) -> tuple[int, ...]:
            return tuple(rng.randrange(16, vocab_size) for _ in range(length))

        if self.kind == "prefill":
            return [Request(prompt(self.context), 1) for _ in range(self.steps)]
        if self.kind == "decode":
            return [Request(prompt(self.context), self.steps + room) for _ in range(self.batch)]
        if self.kind == "uniform":
            return [Request(prompt(self.context), self.steps) for _ in range(self.batch)]
        # Lengths between an eighth and the whole, evenly in the logarithm, as traffic has it.
        return [
            Request(
                prompt(round(self.context * 8 ** -rng.random())),
                round(self.steps * 8 ** -rng.random()),
            )
            for _ in range(self.batch)
        ]


@dataclass
class Event:
    """Tokens that an engine delivered: ``count`` of request ``index`` at ``time`` seconds."""

    time: float
    index: int
    count: int
    finished: bool = False


@dataclass
class Sample:
    """One turn's measurement.

    Attributes:
        seconds: wall time of the timed part.
        tokens: tokens worked through in that time: prompt tokens (prefill), generated ones
            (decode), both (mixed, uniform).
        steps: wall time of each engine step, where the engine is stepped by hand.
        cpu_seconds: CPU time of the worker's process over the turn, all threads; 0 where it was not taken.
    """

    seconds: float
    tokens: int
    steps: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second; of the median step where steps were timed, so that an interrupted one is no matter."""
        if self.steps:
            return self.tokens / len(self.steps) / median(self.steps)
        return self.tokens / self.seconds


def prefill_sample(requests: Sequence[Request], start: float, events: Sequence[Event]) -> Sample:
    """From the start to the last first token."""
    end = max(event.time for event in events)
    return Sample(end - start, sum(len(request.prompt) for request in requests))


def mixed_sample(requests: Sequence[Request], start: float, events: Sequence[Event]) -> Sample:
    """From the start to the last token of all."""
    end = max(event.time for event in events)
    prompts = sum(len(request.prompt) for request in requests)
    return Sample(end - start, prompts + sum(event.count for event in events))


def decode_sample(batch: int, events: Sequence[Event]) -> Sample:
    """The stretch in which all ``batch`` sequences decode: from the last first token to the first
    end.

    Raises:
        ValueError: some sequence ended before another had begun, so there is no such stretch.
    """
    first: dict[int, float] = {}
    ends = []
    for event in events:
        if event.count:
            first.setdefault(event.index, event.time)
        if event.finished:
            ends.append(event.time)
    begin = max(first.values()) if len(first) == batch else float("inf")
    end = min(ends, default=0.0)
    if begin >= end:
        raise ValueError("a sequence ended before all had begun: generate more tokens each")
    return Sample(end - begin, sum(e.count for e in events if begin < e.time <= end))


def _decode(batch: int, context: int, steps: int = 16) -> Workload:
    return Workload(f"decode {batch} x {context}", "decode", batch, context, steps)


def _prefill(context: int, prompts: int = 1) -> Workload:
    return Workload(f"prefill {context}", "prefill", 1, context, prompts)


_QUICK = [_prefill(128, 2), _prefill(512), _decode(1, 128), _decode(8, 128)]
_STANDARD = [
    _prefill(128, 4),
    _prefill(512),
    _prefill(2048),
    _decode(1, 128, 32),
    _decode(8, 128),
    _decode(32, 128),
    _decode(1, 2048, 32),
    _decode(8, 2048),
    Workload("mixed 16", "mixed", 16, 512, 64),
]
_FULL = [*_STANDARD, _decode(32, 2048), Workload("mixed 64", "mixed", 64, 1024, 128)]

# As the release's own comparison has them: 1,024 tokens in and 512 out, so many requests at once.
_SERVING = [
    _decode(1, 1024, 128),
    *[Workload(f"{n} at once", "uniform", n, 1024, 512) for n in (64, 256, 1024)],
]

SETS: dict[str, list[Workload]] = {
    "quick": _QUICK,
    "standard": _STANDARD,
    "full": _FULL,
    "serving": _SERVING,
}


def select(set_name: str, only: Sequence[str] = ()) -> list[Workload]:
    """The workloads of a set whose names contain one of ``only`` (all of them when that is empty).

    Raises:
        ValueError: no such set, or nothing is left.
    """
    if set_name not in SETS:
        raise ValueError(f"unknown set {set_name!r}: choose one of {', '.join(SETS)}")
    chosen = [w for w in SETS[set_name] if not only or any(part in w.name for part in only)]
    if not chosen:
        names = ", ".join(w.name for w in SETS[set_name])
        raise ValueError(f"no workload of {set_name!r} matches {list(only)}: it has {names}")
    return chosen
