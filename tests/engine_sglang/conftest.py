"""Fixtures of the suite of real SGLang engines."""

import sys
from pathlib import Path

from sglang_model.cpu_torch import let_torchvision_import

let_torchvision_import()  # transformers imports it where it is installed, and here it is for SGLang
sys.path.append(str(Path(__file__).resolve().parents[1] / "engine_common"))
from engine_fixtures import interpreting_run, run, server  # noqa: E402, F401
