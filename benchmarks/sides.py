"""The two sides of a comparison: how each is chosen, and the proof that it was."""

from __future__ import annotations

import os

from benchmarks import stock_sglang

SIDES = ("builtin", "ours")

_PACKAGE = {"ours": ("vllm_model.", "sglang_model."), "builtin": ("vllm.", "sglang.")}


def side_environment(side: str, engine: str = "vllm") -> dict[str, str]:
    """The environment of a process that shall serve ``side`` of ``engine``.

    Raises:
        ValueError: no such side.

    """
    if side not in SIDES:
        raise ValueError(f"unknown side {side!r}: choose one of {', '.join(SIDES)}")
    environment = dict(os.environ)
    environment.pop("LFM2_PLUGIN", None)
    if side == "builtin":
        environment["LFM2_PLUGIN"] = "off"
        if engine == "sglang":
            environment |= stock_sglang.environment()
    return environment


def wrong_class(side: str, model_class: str) -> str | None:
    """Why ``model_class`` (module and name) is not that of ``side``, or None if it is."""
    if model_class.startswith(_PACKAGE[side]):
        return None
    return f"the {side} side was served by {model_class}: " + (
        "is lfm2-plugin installed in this environment (`lfm2 doctor`)?"
        if side == "ours"
        else "LFM2_PLUGIN=off did not switch the plugin off"
    )
