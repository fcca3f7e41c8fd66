"""Which implementation of our ops runs: chosen once per kind of device, loud when the choice is impossible.

- ``naive``: the readable loops that define each op; for tests and for finding faults.
- ``native``: vectorised torch, for every device that torch knows.
- ``triton``: kernels for GPUs. Those of short_conv and router are there; they can't be chosen before a GPU has run them
  (``docs/gpu-verification.md``).

``LFM2_PLUGIN_OPS=naive|native|triton`` forces one; unset or ``auto`` takes the best for the device.
"""

from __future__ import annotations

import os

ENV = "LFM2_PLUGIN_OPS"
AVAILABLE = ("naive", "native")
_PLANNED = ("triton",)

_chosen: dict[str, str] = {}


class ImpossibleChoice(RuntimeError):
    """LFM2_PLUGIN_OPS asks for something that is unknown, or that cannot run here."""


def implementation(device_type: str) -> str:
    """The implementation for tensors on ``device_type`` ("cpu", "cuda", ...): "naive" or "native".

    Raises:
        ImpossibleChoice: ``LFM2_PLUGIN_OPS`` names no implementation, or one that this build does not have.
    """
    if device_type not in _chosen:
        _chosen[device_type] = _choose(os.environ.get(ENV, "auto").strip().lower())
    return _chosen[device_type]


def forget() -> None:
    """Read the environment again at the next call (for tests and for the doctor)."""
    _chosen.clear()


def _choose(wanted: str) -> str:
    if wanted in ("", "auto"):
        return "native"
    if wanted in AVAILABLE:
        return wanted
    names = ", ".join(("auto", *AVAILABLE))
    if wanted in _PLANNED:
        raise ImpossibleChoice(
            f"{ENV}={wanted}: this version has no {wanted} kernels to choose yet. Set it to one of {names}."
        )
    raise ImpossibleChoice(f"{ENV}={wanted} is unknown. Set it to one of {names}, or unset it.")
