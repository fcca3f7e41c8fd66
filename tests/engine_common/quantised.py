"""Checkpoints of the demo model as llm-compressor itself writes them, in an environment of its own, made once."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from tests.engine_common.checkpoints import DEMO
from tests.engine_common.engines import REPO, SHARED
from tests.engine_common.shared_cache import made_once

SCRIPT = REPO / "examples" / "quantise_demo_model.py"
ENVIRONMENT = REPO / "tools" / "environment.py"
PYTHON = REPO / ".venvs" / "llm-compressor" / "bin" / "python"


def quantised(name: str) -> Path:
    """The folder of one of the script's recipes, such as "w4a16-g32"; all are made at the first call, in a minute."""
    sources = (SCRIPT, ENVIRONMENT, DEMO / "config.json", DEMO / "model.safetensors")
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    folder = made_once(SHARED / "quantised" / digest[:12], _make) / name
    if not folder.is_dir():
        raise ValueError(f"{SCRIPT.name} has no recipe {name!r}")
    return folder


def _make(folder: Path) -> None:
    for command in ([sys.executable, ENVIRONMENT, "llm-compressor"], [PYTHON, SCRIPT, folder]):
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{command} failed:\n{done.stdout[-4000:]}")
