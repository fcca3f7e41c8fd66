"""Putting classes and functions in the place of SGLang's, with the proof that they took it.

SGLang's registry of hooks, the official way, logs what it can't do and goes on. What may be replaced, all of it, is in
the table ``REPLACED`` of ``engine_names.py``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any

from lfm2_plugin.switch import SWITCH, PluginError

from .engine_api import HookRegistry, HookType, sglang_version
from .engine_names import REPLACED

_registered: set[str] = set()


def replace_in_engine(**replacements: Callable[..., Any]) -> None:
    """Put classes and functions in the place of SGLang's, by their names in ``REPLACED``, in this process.

    Raises:
        PluginError: one of them did not take its place.
    """
    for name, replacement in replacements.items():
        if name not in _registered:
            HookRegistry.register(REPLACED[name], replacement, HookType.REPLACE)
            _registered.add(name)
    HookRegistry.apply_hooks()
    for name, replacement in replacements.items():
        _check(REPLACED[name], replacement)


def _check(target: str, replacement: Callable[..., Any]) -> None:
    try:
        now = pkgutil.resolve_name(target)
        why = f"SGLang runs something else there ({now!r}), as another plugin may have asked"
        if runs(now, replacement):
            return
    except (AttributeError, ImportError) as error:
        why = f"SGLang {sglang_version} has no such thing ({error})"
    raise PluginError(
        f"lfm2-plugin can't serve this: {replacement.__qualname__} must take the place of {target}, and {why}. Leave "
        f"the other plugin out (SGLANG_PLUGINS), install a release that `lfm2 doctor` knows, or set {SWITCH}=off."
    )


def runs(function: Callable[..., Any], wanted: Callable[..., Any]) -> bool:
    """Whether ``function`` is ``wanted`` or one of SGLang's wrappers that calls it, within others' hooks too."""
    if function is wanted:
        return True
    called = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return any(callable(each) and runs(each, wanted) for each in called)
