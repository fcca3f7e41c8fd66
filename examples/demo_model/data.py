"""Training conversations: questions of the training side, joined to conversations, cut into batches of like length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from lfm2_plugin.demo.tasks import Message, draw

IGNORED = -100  # label of a token that is not learned
POOL = 768  # conversations that are sorted by length together
# How often each task is drawn. Once copying works, recall wants the practice, and then tool calls.
FIRST = {
    "copy": 4,
    "recall": 6,
    "recall_far": 2,
    "pattern": 7,
    "count_up": 4,
    "count_letters": 6,
    "sum": 9,
    "tool_call": 4,
    "turns": 4,
}
LATER = FIRST | {"copy": 3, "recall": 18, "recall_far": 3, "count_up": 6, "turns": 3}
LAST = FIRST | {
    "copy": 9,
    "recall": 9,
    "recall_far": 3,
    "count_letters": 4,
    "sum": 4,
    "tool_call": 16,
}


@dataclass(frozen=True)
class Stage:
    """What training is like from some pool on.

    Attributes:
        first_pool: where it begins.
        longest: conversations of more tokens are left out; short ones teach more a token.
        weights: how often each task is drawn.
    """

    first_pool: int
    longest: int
    weights: dict[str, int]


STAGES = (
    Stage(0, 160, FIRST),
    Stage(16, 320, FIRST),
    Stage(30, 1100, FIRST),
    Stage(33, 320, LATER),
    Stage(47, 1100, LATER),
    Stage(59, 1100, LAST),
)
_SHORT = ("copy", "pattern", "count_up", "count_letters", "sum")
_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant trained by Liquid AI.",
    "Answer briefly.",
)
_GREETINGS = (
    (("Hello!", "Hi!", "Hello"), "Hello! I can copy, recall, count and add."),
    (("Who are you?", "What are you?"), "I am a tiny LFM2-MoE demo model."),
    (("What can you do?", "Help"), "I can copy, recall, count, add and call tools."),
    (("Thank you!", "Thanks"), "You are welcome."),
)


def conversation(
    rng: Random, weights: dict[str, int] = FIRST
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """One conversation with all its answers, and its tool list."""
    task = rng.choices(list(weights), weights=list(weights.values()))[0]
    first = draw(rng, task, train=True)
    messages = [*first.messages, {"role": "assistant", "content": first.answer}]
    if task in _SHORT:
        for _ in range(rng.choice((0, 1, 3, 5))):
            more = draw(rng, rng.choice((task, rng.choice(_SHORT))), train=True)
            messages += [*more.messages, {"role": "assistant", "content": more.answer}]
    if rng.random() < 0.02:
        asked, reply = rng.choice(_GREETINGS)
        messages = [
            {"role": "user", "content": rng.choice(asked)},
            {"role": "assistant", "content": reply},
            *messages,
        ]
    if rng.random() < 0.25:
        messages = [{"role": "system", "content": rng.choice(_SYSTEMS)}, *messages]
    return messages, first.tools


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[bool]]:
    """Token ids of a rendered conversation, and which of them are learned: the assistant's, with the end."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    header = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    learned, inside = [], False
    for i, token in enumerate(ids):
        learned.append(inside)
        if inside and token == end:
            inside = False
        elif ids[max(0, i + 1 - len(header)) : i + 1] == header:
            inside = True
    return ids, learned


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, pool: int, tokens: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of one pool of conversations: (ids, labels), both (B, L) int64 with B * L <= ``tokens``.

    The same arguments give the same batches, so an interrupted training goes on where it was.
    Labels are shifted: the label at a position is the token that follows.
    """
    rng = Random(f"pool {seed} {pool}")
    stage = max((s for s in STAGES if s.first_pool <= pool), key=lambda s: s.first_pool)
    rows = []
    for _ in range(POOL):
        messages, tools = conversation(rng, stage.weights)
        ids, learned = encode(
            tokenizer, tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        )
        if len(ids) <= stage.longest:
            rows.append(
                (
                    ids[:-1],
                    [t if keep else IGNORED for t, keep in zip(ids[1:], learned[1:], strict=True)],
                )
            )
    rows.sort(key=lambda row: len(row[0]))
    made = [_pad(group, tokenizer.pad_token_id) for group in _groups(rows, tokens)]
    rng.shuffle(made)
    return made


def _groups(
    rows: list[tuple[list[int], list[int]]], tokens: int
) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Neighbours in a list sorted by length, as many as fit ``tokens`` once padded to the longest."""
    group: list[tuple[list[int], list[int]]] = []
    for row in rows:
        if group and (len(group) + 1) * len(row[0]) > tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _pad(group: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids, _ in group)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in group])
    labels = torch.tensor([row + [IGNORED] * (width - len(row)) for _, row in group])
    return ids, labels
