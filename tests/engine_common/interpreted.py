"""The kernels for GPUs inside a real engine on a CPU: Triton's interpreter runs them for the engine's own steps."""

import sys
from pathlib import Path

from references import Case, cases

ENV = {"LFM2_PLUGIN_OPS": "triton", "TRITON_INTERPRET": "1"}
KERNELS = Path(__file__).parents[2] / "lfm2_plugin" / "ops"
TOKENS = 6
"""New tokens of each prompt: the interpreter takes some 20 ms a program of a kernel."""


def asked(model: str, count: int = 6) -> list[Case]:
    """Short prompts, the first of a few tokens, and two that go over more than one block of rows."""
    kept = [case for case in cases(model) if len(case.prompt) <= 48]
    kept.sort(key=lambda case: len(case.prompt))
    return kept[:: max(1, len(kept) // count)][:count]


def assert_same_beginnings(outputs: list[dict], expected: list[Case]) -> None:
    """The tokens are the first ones of the reference's."""
    for out, case in zip(outputs, expected, strict=True):
        assert out["tokens"] == case.expected.tokens[:TOKENS]


def kernels_in_use(model: object) -> list[str]:
    """A probe: the operators whose kernels this process has loaded, which happens only when they are called."""
    names = sorted(folder.name for folder in KERNELS.iterdir() if (folder / "triton.py").exists())
    return [name for name in names if f"lfm2_plugin.ops.{name}.triton" in sys.modules]
