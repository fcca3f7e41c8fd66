"""torchvision, torchaudio and torchcodec beside torch: whether those that are installed can be imported.

vLLM requires them for models that see or hear. Their builds on PyPI belong to the CUDA build of torch; beside the CPU
build they fail at import ("operator torchvision::nms does not exist"), and transformers, which imports them
where they are installed, fails with them. No text model needs them, so the remedy is to uninstall them.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata, util

from lfm2_plugin.doctor.findings import Finding

NAMES = ("torchvision", "torchaudio", "torchcodec")
TIMEOUT_S = 120


class UninstallFailed(RuntimeError):
    """A package could not be uninstalled; the text says which one and why."""


def companion_findings() -> Iterator[Finding]:
    """One finding for each companion that fails at import; nothing to say about the others."""
    for name, error in broken():
        torch = metadata.version("torch")
        text = f"{name} {metadata.version(name)} fails at import beside torch {torch}: {error}"
        if not _sglang():
            remedy = f"no text model needs it: pip uninstall {name}, which lfm2 doctor --fix does"
            yield Finding("machine", name, "fault", text, remedy)
        elif "+cpu" in torch:
            yield Finding(
                "machine", name, "note", f"{text}; our SGLang platform makes it importable"
            )
        else:
            remedy = f"SGLang imports it: install the {name} that belongs to this torch"
            yield Finding("machine", name, "fault", text, remedy)


def fix() -> list[str]:
    """Uninstall the companions that fail at import, and leave those that SGLang imports.

    Returns:
        The names of what was uninstalled.

    Raises:
        UninstallFailed: neither pip nor uv could.
    """
    if _sglang():
        return []
    names = [name for name, _ in broken()]
    if names:
        done = subprocess.run([*_uninstaller(), *names], capture_output=True, text=True)
        if done.returncode:
            raise UninstallFailed(f"can't uninstall {' '.join(names)}: {done.stderr.strip()}")
    return names


def broken() -> Iterator[tuple[str, str]]:
    """Each companion that is installed and fails at import, with the error.

    In a process of its own: a failed import leaves torch half extended, and a library may crash.
    """
    if util.find_spec("torch") is None:
        return
    for name in NAMES:
        if util.find_spec(name) is None:
            continue
        command = [sys.executable, "-P", "-c", f"import {name}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode:
            yield name, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _sglang() -> bool:
    return util.find_spec("sglang") is not None


def _uninstaller() -> list[str]:
    if util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "uninstall", "--yes"]
    uv = shutil.which("uv")  # its environments have no pip
    if uv is None:
        raise UninstallFailed("neither pip nor uv is here: uninstall them with what installed them")
    return [uv, "pip", "uninstall", "--python", sys.executable]
