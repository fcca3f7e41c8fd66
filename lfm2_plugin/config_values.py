"""What a value of a config.json has to be, by type and range, each complaint in words.

JSON has one kind of number where Python has three, and ``true`` is an ``int`` to Python; NaN and Infinity come through
its parser.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def is_integer(value: Any) -> bool:
    """Whether it is a whole number, which ``True`` and 3.0 are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite number, which ``True`` is not."""
    return (is_integer(value) or isinstance(value, float)) and math.isfinite(value)


def wrong_sizes(values: Mapping[str, Any], names: Iterable[str], least: int = 1) -> list[str]:
    """A complaint for each of ``names`` that is not an integer of at least ``least``; absent ones are passed over."""
    wanted = "a positive integer" if least == 1 else f"an integer from {least} on"
    return [
        f"{name} is {values[name]!r}, not {wanted}"
        for name in names
        if name in values and not (is_integer(values[name]) and values[name] >= least)
    ]


def wrong_numbers(values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """A complaint for each of ``names`` that is not a finite number above 0; absent ones are passed over."""
    return [
        f"{name} is {values[name]!r}, not a number above 0"
        for name in names
        if name in values and not (is_number(values[name]) and values[name] > 0)
    ]


def wrong_flags(values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """A complaint for each of ``names`` that is neither true nor false; absent ones are passed over."""
    return [
        f"{name} is {values[name]!r}, not true or false"
        for name in names
        if name in values and not isinstance(values[name], bool)
    ]


def wrong_lists(values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """A complaint for each of ``names`` that is not a list of strings; absent ones are passed over."""
    return [
        f"{name} is {values[name]!r}, not a list of strings"
        for name in names
        if name in values
        and not (
            isinstance(values[name], list | tuple)
            and all(isinstance(entry, str) for entry in values[name])
        )
    ]
