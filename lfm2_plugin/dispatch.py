"""Which implementation of our ops runs: chosen once per kind of device, loud when the choice is impossible.

- ``naive``: the readable loops that define each op; for tests and for finding faults.
- ``native``: vectorised torch, for every device that torch knows.
- ``triton``: one kernel for GPUs. Of ``short_conv``, ``short_conv_drafts`` and ``router``; other ops stay ``native``.

``LFM2_PLUGIN_OPS=naive|native|triton`` forces one. Unset or ``auto`` it is ``native``, and on a GPU the engines' own
kernels where they have any: no GPU has run ours yet (``docs/gpu-verification.md``). The exception is the router's,
which each GPU tries for itself (``ops/router/trial.py``).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

ENV = "LFM2_PLUGIN_OPS"
AVAILABLE = ("naive", "native", "triton")

_READ_BACK = ("naive", "native")  # their plans of a step ask the device for values

_chosen: dict[str, str] = {}


class ImpossibleChoice(RuntimeError):
    """LFM2_PLUGIN_OPS asks for something that is unknown, or that cannot run here."""


def implementation(device_type: str, *, triton: bool = False) -> str:
    """The implementation for tensors on ``device_type`` ("cpu", "cuda", ...), of an op that has a kernel or has none.

    Args:
        device_type: of the op's tensors.
        triton: whether the op has a Triton kernel.

    Returns:
        One of ``AVAILABLE``.

    Raises:
        ImpossibleChoice: ``LFM2_PLUGIN_OPS`` names no implementation, or one that can't run there.
    """
    if device_type not in _chosen:
        _chosen[device_type] = _choose(_wanted(), device_type)
    name = _chosen[device_type]
    return "native" if name == "triton" and not triton else name


def chosen(
    device_type: str,
    naive: Callable[..., Any],
    native: Callable[..., Any],
    triton: str | None = None,
) -> Callable[..., Any]:
    """The function of an op that :func:`implementation` comes to.

    Args:
        device_type: of the op's tensors.
        naive: the op's naive twin.
        native: its vectorised one.
        triton: where its kernel is, ``module:function``; imported when chosen, since not every machine has triton.
    """
    name = implementation(device_type, triton=triton is not None)
    if name == "triton" and triton is not None:
        module, _, function = triton.partition(":")
        return getattr(importlib.import_module(module), function)
    return naive if name == "naive" else native


def check_choice(device_type: str, *, captures_graphs: bool = False) -> None:
    """Refuse a choice that would fail in the first step, before anything is started.

    Args:
        device_type: of the model.
        captures_graphs: whether whole steps will be captured there (CUDA graphs).

    Raises:
        ImpossibleChoice: ``LFM2_PLUGIN_OPS`` names no implementation, or one that can't run there.
    """
    name = _choose(_wanted(), device_type)
    if captures_graphs and device_type != "cpu" and is_forced() and name in _READ_BACK:
        raise ImpossibleChoice(
            f"{ENV}={name} reads values back from the device in every step, which can't be captured in a CUDA graph: "
            f"choose triton, unset {ENV}, or serve without graphs (vLLM: --enforce-eager; SGLang: "
            "--disable-cuda-graph)."
        )


def is_forced() -> bool:
    """Whether the user names an implementation, which then runs also where an engine has a kernel of its own."""
    return _wanted() != "auto"


def forget() -> None:
    """Read the environment again at the next call (for tests and for the doctor)."""
    _chosen.clear()


def _wanted() -> str:
    return os.environ.get(ENV, "").strip().lower() or "auto"


def _choose(wanted: str, device_type: str) -> str:
    if wanted == "auto":
        return "native"
    if wanted not in AVAILABLE:
        names = ", ".join(("auto", *AVAILABLE))
        raise ImpossibleChoice(f"{ENV}={wanted} is unknown. Set it to one of {names}, or unset it.")
    if wanted == "triton":
        _check_triton(device_type)
    return wanted


def _check_triton(device_type: str) -> None:
    """Triton's kernels run on GPUs, and anywhere in its interpreter (``TRITON_INTERPRET=1``), which is for tests."""
    if importlib.util.find_spec("triton") is None:
        raise ImpossibleChoice(
            f"{ENV}=triton, but the package triton is not installed. Install it, or unset {ENV}."
        )
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ImpossibleChoice(
            f"{ENV}=triton needs a GPU, and this model is on the device {device_type!r}. Unset {ENV}."
        )
