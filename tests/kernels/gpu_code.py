"""Kernels compiled for GPUs that aren't here: runs ``compile_kernel.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("compile_kernel.py")


def compiled(op: str, variants: dict[str, dict], backend: str, arch: str) -> dict[str, dict]:
    """The figures of ``compile_kernel.py`` for each variant of an operator's kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, PROGRAM, op, json.dumps(variants), backend, arch]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
