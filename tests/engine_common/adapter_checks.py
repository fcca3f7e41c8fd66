"""What a server of adapters has to do over HTTP, whatever the engine behind it."""

from collections.abc import Callable
from pathlib import Path

from tests.engine_common.adapters import BAD, TARGETS, adapted_cases, adapter, bad_adapters
from tests.engine_common.references import assert_same, cases

MODEL = "demo"
Load = Callable[[str, Path], str]
"""Asks a server for an adapter by name and folder; what it said against it, "" if it took it."""
Generate = Callable[[list[list[int]], str | None], list[dict]]
"""Prompts and the name of an adapter -> outputs with "tokens"."""


def refuses_and_goes_on(folder: Path, load: Load, generate: Generate) -> None:
    """Every bad adapter is refused in words; the model and a good adapter answer right, before and after.

    Args:
        folder: takes the bad adapters.
    """
    good, merged = adapter(MODEL, *TARGETS["all"])
    plain, adapted = list(cases(MODEL, 40)[:8]), adapted_cases(MODEL, merged)[:24]
    known = {tuple(c.prompt): c.expected.tokens for c in cases(MODEL)}
    changed = [c for c in adapted if c.expected.tokens != known[tuple(c.prompt)]]
    assert len(changed) > 8  # the adapter matters

    def answers_right() -> None:
        assert_same(generate([c.prompt for c in plain], None), plain)
        assert_same(generate([c.prompt for c in adapted], "good"), adapted)

    assert load("good", good) == ""
    answers_right()
    said = {name: load(name, path) for name, path in bad_adapters(MODEL, folder).items()}
    misunderstood = {name: text for name, text in said.items() if BAD[name][1] not in text}
    assert not misunderstood, misunderstood
    answers_right()
