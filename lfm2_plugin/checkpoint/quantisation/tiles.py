"""Which shape a tensor of a quantised layer has: one entry for each tile of the layer's matrix.

A packed weight has an entry for so many columns, a scale one for a group of them, for a row, a block or all there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any, TypeGuard

from lfm2_plugin.checkpoint.names import Shape

_INT32 = 32
_MOST_BITS = 8


@dataclass(frozen=True)
class Tile:
    """The numbers of a matrix (rows, columns) that one entry of a tensor is for; the last tile may be a partial one.

    Attributes:
        rows: so many rows, a fraction where packed values lie across the borders of integers; None for all of them.
        columns: so many columns, likewise.
        transposed: the tensor's first dimension runs along the columns, as in GPTQ and AWQ.
        spaced: a dimension of one behind each, as ModelOpt writes blocks; without them is allowed too.
    """

    rows: int | Fraction | None = 1
    columns: int | Fraction | None = 1
    transposed: bool = False
    spaced: bool = False

    def shapes(self, rows: int, columns: int) -> tuple[Shape, ...]:
        """The shapes that the tensor may have for a matrix of that size, the usual one first.

        One scale of a matrix is (1,) or (), one a row (rows, 1) or (rows,): tools write both.
        """
        down = 1 if self.rows is None else ceil(Fraction(rows) / self.rows)
        along = 1 if self.columns is None else ceil(Fraction(columns) / self.columns)
        if self.transposed:
            return ((along, down),)
        if self.rows is None:
            return ((1,), ()) if self.columns is None else ((along,),)
        if self.columns is None:
            return (down, 1), (down,)
        return ((down, 1, along, 1), (down, along)) if self.spaced else ((down, along),)


@dataclass(frozen=True)
class Fixed:
    """A tensor of one shape, whatever the matrix."""

    shape: Shape

    def shapes(self, rows: int, columns: int) -> tuple[Shape, ...]:
        """That shape."""
        return (self.shape,)


Layout = Tile | Fixed

EACH = Tile()
CHANNEL = Tile(columns=None)
WHOLE = Tile(None, None)
COLUMN = Tile(None, 1)


def dense(bits: int) -> Fraction:
    """Values of so many bits in an int32, where a value may lie across the border of two, as GPTQ packs three bits."""
    return Fraction(_INT32, bits)


def whole(bits: int) -> int:
    """Values of so many bits in an int32, where none lies across a border: compressed-tensors and AWQ."""
    return _INT32 // bits


def is_size(value: Any) -> TypeGuard[int]:
    """Whether an entry of a config is a number of rows or columns."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_bits(value: Any) -> TypeGuard[int]:
    """Whether an entry of a config is a number of bits that a packed value may have."""
    return is_size(value) and value <= _MOST_BITS
