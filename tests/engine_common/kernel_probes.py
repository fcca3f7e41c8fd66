"""Probes for the kernels that an engine runs."""

import sys
from pathlib import Path

OPERATORS = Path(__file__).parents[2] / "lfm2_plugin" / "ops"


def kernels_in_use(model: object) -> list[str]:
    """The operators whose kernels this process has loaded, which happens only when they are called."""
    names = sorted(file.parent.name for file in OPERATORS.glob("*/triton.py"))
    return [name for name in names if f"lfm2_plugin.ops.{name}.triton" in sys.modules]
