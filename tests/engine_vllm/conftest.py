"""Fixtures of the suite of real vLLM engines."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "engine_common"))
from engine_fixtures import interpreting_run, run, server  # noqa: F401
