"""Prompts with a clear answer, and the comparison of an engine's tokens with the reference."""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean

import torch

from tests.engine_common import prompts
from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.hf_reference import Forced, Greedy, greedy, teacher_forced
from tests.tolerances import CLEAR_MARGIN, HALF_PRECISION_ERROR_RATIO

NEW_TOKENS = 16
STEADY = 4  # steps; the mean of fewer is the luck of one rounding that changed an expert


@dataclass(frozen=True)
class Case:
    """A prompt and what transformers continues it with in float32."""

    prompt: list[int]
    expected: Greedy


@cache
def cases(name: str, count: int = prompts.COUNT) -> tuple[Case, ...]:
    """Prompts of a checkpoint whose every greedy step is clear, with transformers' answers.

    All 200, or the first ``count``: the first 40 have 1 to 95 tokens.
    """
    asked = prompts.random_prompts(vocabulary(name))[:count]
    if name == "demo":
        asked[::2] = questions_as_prompts(len(asked[::2]))
    return clear_cases(checkpoint(name), asked, vocabulary(name))


def clear_cases(folder: Path, asked: list[list[int]], vocab: int) -> tuple[Case, ...]:
    """The prompts with a checkpoint's answers; another of the same length where an answer is unclear."""
    asked = list(asked)
    answers = greedy(folder, asked, NEW_TOKENS)
    rng = random.Random(1)
    unclear = [i for i, a in enumerate(answers) if min(a.margins) < CLEAR_MARGIN]
    while unclear:
        others = [prompts.fresh_tokens(rng, vocab, len(asked[i])) for i in unclear]
        for index, prompt, answer in zip(
            unclear, others, greedy(folder, others, NEW_TOKENS), strict=True
        ):
            asked[index], answers[index] = prompt, answer
        unclear = [i for i in unclear if min(answers[i].margins) < CLEAR_MARGIN]
    return tuple(Case(p, a) for p, a in zip(asked, answers, strict=True))


def questions_as_prompts(count: int) -> list[list[int]]:
    """Questions of the demo model's tasks, rendered by its chat template."""
    from transformers import AutoTokenizer

    from lfm2_plugin.demo.tasks import questions
    from tests.engine_common.demo_reference import prompt_ids

    tokenizer = AutoTokenizer.from_pretrained(checkpoint("demo"))
    return [prompt_ids(tokenizer, q) for q in questions(seed=1, n=count)]


def vocabulary(name: str) -> int:
    import json

    return json.loads((checkpoint(name) / "config.json").read_text())["vocab_size"]


def wrong(outputs: list[dict], asked: list[Case] | tuple[Case, ...]) -> list[str]:
    """One line for every output that is not the reference's, token for token."""
    lines = []
    for index, (out, case) in enumerate(zip(outputs, asked, strict=True)):
        want = case.expected.tokens[: len(out["tokens"])]
        if out["tokens"] != want or not want:
            lines.append(
                f"prompt {index} ({len(case.prompt)} tokens): {out['tokens']} is not {want}"
            )
    return lines


def assert_same(outputs: list[dict], asked: list[Case] | tuple[Case, ...]) -> None:
    """Every output is the reference's continuation, token for token."""
    lines = wrong(outputs, asked)
    assert not lines, f"{len(lines)} of {len(outputs)} differ:\n" + "\n".join(lines[:5])


@cache
def bf16_view(name: str) -> tuple[Forced, ...]:
    """Transformers' own bf16 on the cases' texts."""
    texts = [c.prompt + c.expected.tokens for c in cases(name)]
    return tuple(teacher_forced(checkpoint(name), texts, NEW_TOKENS, torch.bfloat16))


@cache
def bf16_tie(name: str) -> float:
    """The largest float32 margin at which bf16 may choose another token than float32.

    HALF_PRECISION_ERROR_RATIO times the largest that transformers' own bf16 overturns on these texts:
    on random checkpoints that is far from nothing, since a rounding can change an expert.
    """
    overturned = [
        margin
        for case, view in zip(cases(name), bf16_view(name), strict=True)
        for margin, choice, token in zip(
            case.expected.margins, view.choices, case.expected.tokens, strict=True
        )
        if choice != token
    ]
    return HALF_PRECISION_ERROR_RATIO * max(overturned, default=0.0)


def assert_bf16(name: str, outputs: list[dict], indices: list[int] | None = None) -> None:
    """bf16 continuations (with logprobs) of the named cases against float32 and transformers' bf16.

    Before a continuation's first other token, its logprobs are at most HALF_PRECISION_ERROR_RATIO
    times as far from float32's as those of transformers' bf16 at the same steps: on the average of
    all, and each continuation compared with transformers' worst. At the first other token float32's
    margin is below ``bf16_tie``. What follows it is another text and is not compared.
    """
    chosen = list(range(len(outputs))) if indices is None else indices
    ours, theirs, clear = [], [], []
    for index, out in zip(chosen, outputs, strict=True):
        want, view = cases(name)[index].expected, bf16_view(name)[index]
        same = [a == b for a, b in zip(out["tokens"], want.tokens, strict=True)]
        steps = same.index(False) if False in same else len(same)
        if steps < len(same) and want.margins[steps] >= bf16_tie(name):
            clear.append(f"prompt {index} step {steps}: margin {want.margins[steps]:.3f}")
        for found, errors in ((out["logprobs"], ours), (view.logprobs, theirs)):
            errors.append([abs(found[i] - want.logprobs[i]) for i in range(steps)])
    assert not clear, f"{len(clear)} decisions changed above {bf16_tie(name):.3f}: {clear[:5]}"
    compared = sum(map(len, ours))
    assert compared > 4 * len(outputs)
    average = sum(map(sum, ours)) / compared
    allowed = HALF_PRECISION_ERROR_RATIO * sum(map(sum, theirs)) / compared
    assert average <= allowed, f"mean logprob error {average:.4f}, allowed {allowed:.4f}"
    worst = max(mean(e) for e in ours if len(e) >= STEADY)
    allowed = HALF_PRECISION_ERROR_RATIO * max(mean(e) for e in theirs if len(e) >= STEADY)
    assert worst <= allowed, (
        f"a continuation's mean logprob error {worst:.4f}, allowed {allowed:.4f}"
    )
