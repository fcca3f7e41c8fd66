"""What a quantised linear layer consists of in a file: its tensors, their dtypes and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from lfm2_plugin.checkpoint.names import Shape
from lfm2_plugin.checkpoint.quantisation.tiles import EACH, Layout

Dtypes = frozenset[str]  # as the header of a safetensors file writes them

FLOAT: Dtypes = frozenset({"BF16", "F16", "F32"})
FP8: Dtypes = frozenset({"F8_E4M3"})
FP32: Dtypes = frozenset({"F32"})
INT8: Dtypes = frozenset({"I8"})
INT32: Dtypes = frozenset({"I32"})
INDEX: Dtypes = frozenset({"I32", "I64"})
UINT8: Dtypes = frozenset({"U8"})


class UnsupportedQuantisation(ValueError):
    """A quantization_config that we don't know or that contradicts itself; the text names the entry and what to do."""


@dataclass(frozen=True)
class WeightFormat:
    """One way to write a linear layer's weight.

    Attributes:
        name: what it is called in messages, such as "W4A16 int4 g128".
        parameters: the tensors that every layer of this format has, name below the module -> allowed dtypes.
        optional: those that it may have besides.
        layouts: name -> what its shape follows; of several, any is right. Without an entry every shape is.
    """

    name: str
    parameters: Mapping[str, Dtypes] = field(hash=False)
    optional: Mapping[str, Dtypes] = field(default_factory=dict, hash=False)
    layouts: Mapping[str, tuple[Layout, ...]] = field(default_factory=dict, hash=False)

    @property
    def marks(self) -> Dtypes:
        """The tensors that tell a layer of this format from an unquantised one: all but "weight"."""
        return frozenset(self.parameters) - {"weight"}

    def shapes(self, parameter: str, rows: int, columns: int) -> tuple[Shape, ...]:
        """The shapes that a tensor may have beside a matrix of that size, the usual one first; none if any is right."""
        layouts = self.layouts.get(parameter, ())
        return tuple(dict.fromkeys(s for each in layouts for s in each.shapes(rows, columns)))


PLAIN = WeightFormat("unquantised", {"weight": FLOAT}, layouts={"weight": (EACH,)})

# transformers 4 has the router as a Linear, transformers 5 as a class of its own, which no tool takes for a linear
# layer: whether the entries that mean "every Linear" included it, only the file can tell.
_ROUTER = re.compile(r"(.*\.)?feed_forward\.gate")


def is_router(module: str) -> bool:
    """Whether the module is the router of a layer with experts."""
    return _ROUTER.fullmatch(module) is not None


class Held:
    """The names of a file's tensors, asked where a quantization_config leaves it open what a module is."""

    def __init__(self, tensors: Iterable[str]) -> None:
        self._parameters: dict[str, set[str]] = {}
        for name in tensors:
            module, _, parameter = name.rpartition(".")
            self._parameters.setdefault(module, set()).add(parameter)

    def decide(self, module: str, promised: WeightFormat, otherwise: WeightFormat) -> WeightFormat:
        """``promised`` or plain, as the file has it; ``otherwise`` if the file has nothing of the module."""
        parameters = self._parameters.get(module)
        if parameters is None:
            return otherwise
        return promised if parameters & promised.marks else PLAIN


def strings(config: Mapping[str, Any], key: str) -> list[str]:
    """A list of names in a config; absent and null are an empty one.

    Raises:
        UnsupportedQuantisation: it is something else.
    """
    found = config.get(key)
    if found is None:
        return []
    if not isinstance(found, list | tuple) or not all(isinstance(entry, str) for entry in found):
        raise UnsupportedQuantisation(
            f"quantization_config: {key} is {found!r}, not a list of module names. Correct the "
            "checkpoint's config.json."
        )
    return list(found)


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression of an entry; there are more entries in some lists than the cache of ``re`` holds.

    Raises:
        UnsupportedQuantisation: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UnsupportedQuantisation(
            f"quantization_config: {pattern!r} is not a regular expression ({error}). "
            "Correct the checkpoint's config.json."
        ) from error


def begins_with(pattern: str, name: str) -> bool:
    """Whether the regular expression matches at the beginning of the name; raises as :func:`compiled`."""
    return compiled(pattern).match(name) is not None
