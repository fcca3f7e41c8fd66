"""The kernels for GPUs inside a real engine on a CPU: Triton's interpreter runs them for the engine's own steps."""

from tests.engine_common.references import Case, cases

ENV = {"LFM2_PLUGIN_OPS": "triton", "TRITON_INTERPRET": "1"}
TOKENS = 6
"""New tokens of each prompt: the interpreter takes some 20 ms a program of a kernel."""


def asked(model: str, count: int = 6) -> list[Case]:
    """Short prompts, the first of a few tokens, and two that go over more than one block of rows."""
    kept = [case for case in cases(model) if len(case.prompt) <= 100]
    kept.sort(key=lambda case: len(case.prompt))
    return kept[:: max(1, len(kept) // count)][:count]


def assert_same_beginnings(outputs: list[dict], expected: list[Case]) -> None:
    """The tokens are the first ones of the reference's."""
    for out, case in zip(outputs, expected, strict=True):
        assert out["tokens"] == case.expected.tokens[:TOKENS]
