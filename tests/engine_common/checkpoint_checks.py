"""What checkpoints as people bring them have to give, whatever the engine: the reference's tokens, or words."""

from __future__ import annotations

from pathlib import Path

from tests.engine_common import broken
from tests.engine_common.brought import FORMATS, SOURCE, with_another_head
from tests.engine_common.references import Case, assert_same, cases, clear_cases
from tests.tiers import matrix

COUNT = 16


def some(kinds: dict, always: list[str]) -> list:
    """The names of all kinds; those that aren't in ``always`` for `make test-all`."""
    return [name if name in always else matrix(name) for name in kinds]


def asked_of(reference: Path, source: str = SOURCE, vocabulary: int = 512) -> list[Case]:
    """The prompts of ``source`` with the answers of another checkpoint, as far as these are clear."""
    return list(clear_cases(reference, [c.prompt for c in cases(source, COUNT)], vocabulary))


def outputs(run, folder: Path, engine: dict, asked: list[Case]) -> list[dict]:
    """An engine's answers to the prompts."""
    return run(folder, engine, [{"prompts": [case.prompt for case in asked]}])["steps"][0]


def same_first_tokens(answers: list[dict], asked: list[Case]) -> int:
    """How many answers begin as the reference's."""
    pairs = zip(answers, asked, strict=True)
    return sum(out["tokens"][0] == case.expected.tokens[0] for out, case in pairs)


def assert_served(run, folder: Path, engine: dict) -> None:
    """With the tokens of SOURCE."""
    asked = list(cases(SOURCE, COUNT))
    assert_same(outputs(run, folder, engine, asked), asked)


def assert_refused(run, folder: Path, engine: dict, words: tuple[str, ...], long_work) -> None:
    """In these words, before any long work."""
    text = broken.refused(run, folder, engine, long_work)
    assert broken.unsaid(words, text) == []


def assert_no_kernels(run, folder: Path, name: str, engine: dict, long_work) -> None:
    """One of FORMATS is refused by its method."""
    words = (*FORMATS[name].refused, "no kernel|not supported|Unknown quantization method")
    assert_refused(run, FORMATS[name].make(folder), engine, words, long_work)


def assert_another_head(run, folder: Path, engine: dict) -> None:
    """As in transformers, which serves the head that is there."""
    made = with_another_head(folder)
    asked = asked_of(made)
    assert_same(outputs(run, made, engine, asked), asked)
    tied = {tuple(case.prompt): case.expected.tokens for case in cases(SOURCE, COUNT)}
    assert all(tied[tuple(c.prompt)] != c.expected.tokens for c in asked if tuple(c.prompt) in tied)
