"""What is wrong with a checkpoint, a weight update or its files: the lists, and the one error that tells all of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint.layouts import recognise
from lfm2_plugin.checkpoint.names import Shape

_NUMBER = re.compile(r"\d+")
_LISTED = 4  # names of one kind that are printed before they are summed up


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; ``report`` has the full lists where the files could be read."""

    def __init__(self, message: str, report: CheckpointReport | None = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class CheckpointReport:
    """What is wrong with a checkpoint, by the names that it uses itself.

    Attributes:
        missing: names (of the hub) that the model needs.
        unexpected: name -> why it has no place, in brackets; empty if the model has no such tensor.
        wrong_shape: name -> (shape in the checkpoint, which shapes are right and why, in words).
        wrong_dtype: name -> (dtype in the checkpoint, what its module needs), as safetensors spells dtypes.
        twice: names of tensors that came a second time, under the same name or another spelling of it.
        unplaced: names for which the engine's model has no parameter.
        unfilled: parameters of the engine's model that nothing was loaded into.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: dict[str, str] = field(default_factory=dict)
    wrong_shape: dict[str, tuple[Shape, str]] = field(default_factory=dict)
    wrong_dtype: dict[str, tuple[str, str]] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)
    unplaced: list[str] = field(default_factory=list)
    unfilled: list[str] = field(default_factory=list)

    def raise_if_bad(
        self,
        where: str = "the checkpoint",
        layout: tuple[Lfm2MoeArch, Mapping[str, Shape]] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Raise a CheckpointError that lists everything, many tensors of one kind as one line.

        Args:
            where: what was read, for the text.
            layout: the model, and all tensors by name and shape, for telling what else the files may be.
            files: the file that a tensor is in, for the text.
        """
        parts = self._parts(files or {})
        if not parts:
            return
        if layout is not None and (found := recognise(layout[1], layout[0])):
            other, witnesses = found
            raise CheckpointError(
                f"This is {other.what}, which is not supported: {where} has "
                f"{summary(witnesses)}. {other.remedy}",
                self,
            )
        raise CheckpointError(
            f"The tensors of {where} do not fit its config.json. "
            + "; ".join(parts)
            + ". Use the config.json that belongs to these files, or files of this model.",
            self,
        )

    def _parts(self, files: Mapping[str, str]) -> list[str]:
        """One text for each kind of fault that there is."""
        at = {name: f" (in {file})" for name, file in files.items()}
        shapes = {
            name: f" is {list(found)}, not {needed}"
            for name, (found, needed) in self.wrong_shape.items()
        }
        dtypes = {
            name: f" is {found}, not {needed}" for name, (found, needed) in self.wrong_dtype.items()
        }
        kinds: tuple[tuple[str, Collection[str], dict[str, str]], ...] = (
            ("missing", self.missing, {}),
            ("unexpected", self.unexpected, self.unexpected),
            ("of another shape", self.wrong_shape, shapes),
            ("of another dtype", self.wrong_dtype, dtypes),
            ("that came twice", self.twice, {}),
            ("without a place in the engine's model", self.unplaced, {}),
            ("of the engine's model that nothing was loaded into", self.unfilled, {}),
        )
        return [
            f"{len(names)} {kind}: "
            + summary(list(names), {n: notes.get(n, "") + at.get(n, "") for n in names})
            for kind, names, notes in kinds
            if names
        ]


def summary(names: list[str], notes: dict[str, str] | None = None) -> str:
    """Names, those that differ in numbers only summed up when they are many."""
    notes = notes or {}
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_NUMBER.sub("*", name), []).append(name)
    texts = []
    for kind, members in kinds.items():
        shown = members if len(members) <= _LISTED else [members[0]]
        texts += [name + notes.get(name, "") for name in shown]
        if len(members) > _LISTED:
            texts[-1] += f" and {len(members) - 1} more like {kind}"
    return ", ".join(texts)
