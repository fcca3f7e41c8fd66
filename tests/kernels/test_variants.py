"""How many kernels are compiled while an engine serves: one an operator, whatever the sizes of its steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("count_variants.py")


def test_no_size_of_a_step_has_a_kernel_of_its_own() -> None:
    """Compiled in the middle of serving, each would hold up every request for a second or more."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"short_conv": 1, "short_conv_drafts": 1, "router": 1}
