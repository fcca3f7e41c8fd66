"""Whether an engine's release is one that this package was tested on, for the text of its refusal or its warning."""

from __future__ import annotations

import re

from lfm2_plugin.switch import PluginError


def check_release(
    version: str, supported: tuple[str, str], engine: str = "vLLM", significant: int = 2
) -> str | None:
    """Compare an engine's version with the tested range.

    Args:
        version: the engine's own ``__version__``, such as ``0.32.0`` or ``0.33.1.dev7+gabc``.
        supported: the lowest and the highest release that the test suite ran on.
        engine: the engine's name, for the text.
        significant: how many numbers of a release tell what a plugin builds on; SGLang changes it with every third.

    Returns:
        None inside the range, else one sentence of warning (newer, or not a release number).

    Raises:
        PluginError: older than the lowest.
    """
    lowest, highest = supported
    release = _release(version)
    if release is None:
        return f"{engine} {version!r} has no release number; lfm2-plugin was tested on {lowest} to {highest}"
    if release < (_release(lowest) or ()):
        raise PluginError(
            f"{engine} {version} is too old for lfm2-plugin, which supports {lowest} to {highest}: upgrade {engine}"
        )
    if release[:significant] > (_release(highest) or ())[:significant]:
        return (
            f"{engine} {version} is newer than {highest}, the newest that lfm2-plugin was tested on"
        )
    return None


def _release(version: str) -> tuple[int, int, int] | None:
    """The numbers of a version: ``0.33.1.dev7+gabc`` -> (0, 33, 1); None where it has none that mean anything.

    ``0.1.dev7+gabc`` is what setuptools-scm calls a source tree without tags, of whatever release, and ``0.0.0.dev0``
    what SGLang calls one that it can't ask.
    """
    if re.match(r"0\.(1|0\.0)\.dev\d", version):
        return None
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None
