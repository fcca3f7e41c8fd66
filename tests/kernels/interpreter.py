"""Triton's interpreter beside running kernels: watch what programs read and write, change the order they run in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter as MODULE


def in_order(monkeypatch: pytest.MonkeyPatch, order: Callable[[int], list[int]]) -> None:
    """Run the programs of each launch in ``order(number of programs)``, not one after another."""
    builder = MODULE.interpreter_builder
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    shape, places = (1, 1, 1), [0]

    def dim(*grid: int) -> None:
        nonlocal shape, places
        shape, places = grid, order(int(np.prod(grid)))
        set_dim(*grid)

    def idx(*program: int) -> None:
        set_idx(*np.unravel_index(places[np.ravel_multi_index(program, shape)], shape))

    monkeypatch.setattr(builder, "set_grid_dim", dim)
    monkeypatch.setattr(builder, "set_grid_idx", idx)


@dataclass
class Access:
    """Elements that one load or store of one program touched."""

    program: tuple[int, ...]
    stores: bool
    addresses: np.ndarray  # bytes


class Watch:
    """The accesses of all programs since it was made, masked lanes left out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.accesses: list[Access] = []
        builder = MODULE.interpreter_builder
        load, store = builder.create_masked_load, builder.create_masked_store

        def note(pointers: Any, mask: Any, stores: bool) -> None:
            lanes = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
            access = Access(tuple(builder.grid_idx), stores, pointers.data[lanes].copy())
            self.accesses.append(access)

        def loads(pointers: Any, mask: Any, *others: Any) -> Any:
            note(pointers, mask, False)
            return load(pointers, mask, *others)

        def writes(pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
            note(pointers, mask, True)
            return store(pointers, value, mask, *others)

        monkeypatch.setattr(builder, "create_masked_load", loads)
        monkeypatch.setattr(builder, "create_masked_store", writes)

    def of(self, tensor: torch.Tensor, stores: bool) -> list[Access]:
        """The accesses to a tensor's memory, addresses as indices into it. It may be a view; its storage counts."""
        begin = tensor.untyped_storage().data_ptr()
        end = begin + tensor.untyped_storage().nbytes()
        found = []
        for access in self.accesses:
            here = access.addresses[(access.addresses >= begin) & (access.addresses < end)]
            if access.stores == stores and here.size:
                found.append(
                    Access(access.program, stores, (here - begin) // tensor.element_size())
                )
        return found

    def count(self, tensor: torch.Tensor, stores: bool) -> int:
        """Elements, each as often as it is touched."""
        return sum(access.addresses.size for access in self.of(tensor, stores))
