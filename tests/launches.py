"""How many kernels a GPU would launch for a piece of torch, counted on a CPU."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

FREE = {"empty", "view", "alias", "detach", "slice", "select", "unsqueeze", "expand", "t"}
"""Operators that launch nothing: memory, and other ways to look at it."""
POISON = {"fill_"}
"""What ``tests/conftest.py`` does to memory that nobody wrote."""


class Launches(TorchDispatchMode):
    """Counts the operators that run while it is active, and what :meth:`watched` kernels are launched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE | POISON:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def watched(self, kernel: Any) -> Any:
        """A Triton kernel whose launches are counted."""
        return _Watched(kernel, self)


class _Watched:
    def __init__(self, kernel: Any, launches: Launches) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        run = self.kernel[grid]

        def launch(*args: Any, **kwargs: Any) -> Any:
            # What the interpreter does to run the kernel is no launch.
            before = list(self.launches.names)
            done = run(*args, **kwargs)
            self.launches.names = [*before, self.kernel.__name__]
            return done

        return launch
