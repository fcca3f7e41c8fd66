"""Prompts with a clear answer, and the comparison of an engine's tokens with the reference."""

import random
from dataclasses import dataclass
from functools import cache

import prompts
from checkpoints import checkpoint
from hf_reference import Greedy, greedy

NEW_TOKENS = 16
# Float32 sums in another order move our logits (of size one to ten) by some 1e-5; where the two best
# are closer than this, either choice is right, so such prompts are replaced by others of their length.
CLEAR = 1e-3


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
    folder = checkpoint(name)
    vocab = vocabulary(name)
    asked = prompts.random_prompts(vocab)[:count]
    answers = greedy(folder, asked, NEW_TOKENS)
    rng = random.Random(1)
    unclear = [i for i, a in enumerate(answers) if min(a.margins) < CLEAR]
    while unclear:
        others = [prompts.fresh_tokens(rng, vocab, len(asked[i])) for i in unclear]
        for index, prompt, answer in zip(
            unclear, others, greedy(folder, others, NEW_TOKENS), strict=True
        ):
            asked[index], answers[index] = prompt, answer
        unclear = [i for i in unclear if min(answers[i].margins) < CLEAR]
    return tuple(Case(p, a) for p, a in zip(asked, answers, strict=True))


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


# The largest margin at which bf16 may choose another token than float32. Logits of size one to ten
# carry 8 bits: each of the model's roundings moves them by up to 2**-8 of their size.
BF16_TIE = 0.5


def assert_same_but_for_ties(outputs: list[dict], asked: list[Case] | tuple[Case, ...]) -> None:
    """bf16 against float32: where the tokens part, float32's margin was below BF16_TIE.

    Only what comes before the first difference is compared; with logprobs in the outputs, so are
    they (see ``logprob_error``).
    """
    clear, apart = [], 0
    for index, (out, case) in enumerate(zip(outputs, asked, strict=True)):
        want = case.expected.tokens
        step = next((i for i, (a, b) in enumerate(zip(out["tokens"], want)) if a != b), None)
        if step is None:
            continue
        apart += 1
        margin = case.expected.margins[step]
        if margin >= BF16_TIE:
            clear.append(f"prompt {index} step {step}: margin {margin:.3f}")
    assert not clear, f"{len(clear)} clear decisions changed: {clear[:5]}"
    assert apart < len(outputs) / 2, f"{apart} of {len(outputs)} continuations differ"


def logprob_error(outputs: list[dict], asked: list[Case] | tuple[Case, ...]) -> float:
    """Mean difference of the logprobs from float32's, over the tokens before the first difference."""
    total, count = 0.0, 0
    for out, case in zip(outputs, asked, strict=True):
        rows = zip(out["tokens"], case.expected.tokens, out["logprobs"], case.expected.logprobs)
        for token, want, logprob, reference in rows:
            if token != want:
                break
            total, count = total + abs(logprob - reference), count + 1
    return total / count
