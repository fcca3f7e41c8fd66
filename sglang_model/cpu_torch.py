"""What SGLang takes for granted of torch and a CPU build lacks: an importable torchvision, and pinned memory.

Both are put right with torch's own means of adding to an operator (``torch.library``), once a process.
``docs/decisions/0007-sglang-on-a-cpu.md`` says why not otherwise.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_kept: dict[str, torch.library.Library] = {}  # what a library adds lives as long as it does


def let_torchvision_import() -> None:
    """Import torchvision; where its library can't be loaded, declare its operators, without code behind them, first.

    The torchvision that PyPI offers is compiled for the CUDA build of torch. Beside the CPU build its library can't
    be loaded, and then already ``import torchvision`` fails, because it describes two operators that the library
    would have brought. SGLang imports it for models that see; no text model calls it. A torchvision that is whole, or
    absent, is left as it is.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return  # SGLang names it when it misses it
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in _OPERATORS:
            library.define(name + _SCHEMA)
        _kept["torchvision"] = library
        importlib.import_module("torchvision")


def let_memory_be_pinned() -> None:
    """Where there is no accelerator to pin memory for, a tensor counts as pinned as it is.

    SGLang's scheduler pins a mask in each step that keeps snapshots of states (``prepare_for_decode``), and torch
    raises for want of an accelerator.
    """
    if torch.accelerator.is_available() or "pinned" in _kept:
        return
    library = torch.library.Library("aten", "IMPL")
    library.impl("_pin_memory", lambda tensor, device=None: tensor, "CPU")
    _kept["pinned"] = library


class _PageableFactories(TorchFunctionMode):
    """Torch's functions that make tensors, deaf to ``pin_memory``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wanted = {k: v for k, v in (kwargs or {}).items() if k != "pin_memory"}
        return func(*args, **wanted)


@contextlib.contextmanager
def memory_needs_no_pinning() -> Iterator[None]:
    """Within it, ``torch.tensor(..., pin_memory=True)`` gives a plain tensor where there is no accelerator.

    SGLang's LoRA layers are built with such tensors, which torch refuses to make. What :func:`let_memory_be_pinned`
    does reaches only tensors that are pinned after they were made.
    """
    with contextlib.nullcontext() if torch.accelerator.is_available() else _PageableFactories():
        yield
