"""Is a checkpoint whole? Every tensor is accounted for, and an error lists all that is wrong at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint.names import (
    KV_SCALES,
    NEEDED_SCALES,
    QUANTISED_PARAMETERS,
    QUANTISED_WEIGHTS,
    Shape,
    expected_tensors,
    is_quantisable,
    optional_tensors,
)

INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20  # bytes; the format's own limit
_NUMBER = re.compile(r"\d+")
_LISTED = 4  # names of one kind that are printed before they are summed up
_STACKED_COVERS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; ``report`` has the full lists where the files could be read."""

    def __init__(self, message: str, report: CheckpointReport | None = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class CheckpointReport:
    """What is wrong with a checkpoint.

    Attributes:
        missing: names that the model needs.
        unexpected: names that the model does not have.
        wrong_shape: name -> (shape in the checkpoint, shape of the model).
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)

    def raise_if_bad(self, where: str = "the checkpoint") -> None:
        """Raise a CheckpointError that lists everything, many tensors of one kind as one line."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} missing: {_summary(self.missing)}")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} unexpected: {_summary(self.unexpected)}")
        if self.wrong_shape:
            notes = {
                name: f" is {list(found)}, not {list(needed)}"
                for name, (found, needed) in self.wrong_shape.items()
            }
            parts.append(f"{len(notes)} of another shape: {_summary(list(notes), notes)}")
        if parts:
            raise CheckpointError(
                f"The tensors of {where} do not fit its config.json. "
                + "; ".join(parts)
                + ". Download it again, or correct the config.",
                self,
            )


class StreamCheck:
    """Checks tensors one by one as an engine hands them over; :meth:`finish` says what never came."""

    def __init__(self, arch: Lfm2MoeArch, *, quantised: bool = False) -> None:
        """Args as in :func:`check_checkpoint`."""
        self._expected = expected_tensors(arch)
        self._stacked = expected_tensors(arch, stacked=True)
        self._allowed = {**optional_tensors(arch), **self._stacked, **self._expected}
        self._quantised = quantised
        self._seen: set[str] = set()
        self._wrong: dict[str, tuple[Shape, Shape]] = {}

    def see(self, name: str, shape: Sequence[int]) -> None:
        """Take note of a tensor.

        Raises:
            CheckpointError: the model has no such tensor, or has it in another shape.
        """
        before = len(self._wrong)
        if not self._note(name, tuple(shape)):
            CheckpointReport(unexpected=[name]).raise_if_bad()
        if len(self._wrong) > before:
            CheckpointReport(wrong_shape={name: self._wrong[name]}).raise_if_bad()

    def finish(self, *, all_experts: bool = True) -> None:
        """Everything came that should have.

        Args:
            all_experts: False where an engine leaves out the experts of other ranks.

        Raises:
            CheckpointError: lists what did not come.
        """
        missing = self._missing()
        if not all_experts:
            missing = [name for name in missing if ".experts." not in name]
        CheckpointReport(missing=missing).raise_if_bad()

    def report(self, tensors: Iterable[tuple[str, Sequence[int]]]) -> CheckpointReport:
        """The report for a whole checkpoint, given (name, shape) of each of its tensors."""
        unexpected = [name for name, shape in tensors if not self._note(name, tuple(shape))]
        return CheckpointReport(self._missing(), sorted(unexpected), self._wrong)

    def _note(self, name: str, shape: Shape) -> bool:
        """Whether the model has such a tensor; a wrong shape is written down."""
        needed = self._allowed.get(name)
        if needed is not None:
            self._seen.add(name)
            free = self._quantised and is_quantisable(name)
            if shape != needed and not free:
                self._wrong[name] = (shape, needed)
            return True
        if name.endswith(
            ".inv_freq"
        ):  # a rotary table that old versions saved; derived, never read
            return True
        module, _, parameter = name.rpartition(".")
        if not self._quantised:
            return False
        if parameter in QUANTISED_PARAMETERS and self._is_linear(module):
            self._seen.add(name)
            return True
        return any(name.endswith(f".{scale}") for scale in KV_SCALES)

    def _is_linear(self, module: str) -> bool:
        weight = f"{module}.weight"
        return weight in self._allowed and is_quantisable(weight)

    def _missing(self) -> list[str]:
        stacked = {
            (layer, w)
            for layer, _, last in (name.rpartition(".experts.") for name in self._seen)
            for w in _STACKED_COVERS.get(last, ())
        }
        missing = [name for name in self._expected if not self._came(name, stacked)]
        for name in self._seen:
            module, _, parameter = name.rpartition(".")
            scale = NEEDED_SCALES.get(parameter)
            if scale is not None and f"{module}.{scale}" not in self._seen:
                missing.append(f"{module}.{scale}")
        return missing

    def _came(self, name: str, stacked: set[tuple[str, str]]) -> bool:
        if name in self._seen:
            return True
        layer, _, rest = name.rpartition(".experts.")
        if rest and (layer, rest.split(".")[1]) in stacked:
            return True
        module, _, parameter = name.rpartition(".")
        return (
            self._quantised
            and parameter == "weight"
            and any(f"{module}.{other}" in self._seen for other in QUANTISED_WEIGHTS)
        )


def check_checkpoint(arch: Lfm2MoeArch, folder: Path | str, quantised: bool = False) -> None:
    """Check a folder of safetensors by its headers; no weight is read.

    Args:
        arch: the model that the config describes.
        folder: where the files are.
        quantised: matmul weights may be packed and have scales beside them; then they are checked by
            presence, all other tensors by shape as well.

    Raises:
        CheckpointError: unreadable files, or missing, unexpected or misshapen tensors, all of them.
    """
    tensors = inspect_safetensors(folder)
    report = StreamCheck(arch, quantised=quantised).report(
        (name, shape) for name, (_, shape) in tensors.items()
    )
    report.raise_if_bad(str(folder))


def inspect_safetensors(folder: Path | str) -> dict[str, tuple[str, Shape]]:
    """Names, dtypes (as the format writes them: "BF16", ...) and shapes in a folder, by headers only.

    With an index file its files are read, else every ``*.safetensors``.

    Raises:
        CheckpointError: no files, or truncated, corrupt or missing ones; all of them are named.
    """
    folder = Path(folder)
    weight_map: dict[str, str] = {}
    problems: list[str] = []
    if (folder / INDEX).is_file():
        weight_map = _read_index(folder / INDEX)
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"There is no *.safetensors file in {folder}. Is it a checkpoint?")

    tensors: dict[str, tuple[str, Shape]] = {}
    for file in files:
        try:
            header = _read_header(file)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        problems += [f"{file.name}: a second {n}" for n in header if n in tensors]
        absent = [n for n, place in weight_map.items() if place == file.name and n not in header]
        if absent:
            problems.append(f"{file.name}: lacks {_summary(absent)}, which {INDEX} promises")
        tensors |= header
    if problems:
        raise CheckpointError(
            f"The files in {folder} are damaged or incomplete: {'; '.join(problems)}. "
            "Download them again."
        )
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not an index of safetensors files ({type(error).__name__}: {error}). "
            "Download it again."
        ) from error


def _read_header(path: Path) -> dict[str, tuple[str, Shape]]:
    """One file: 8 bytes of header length, a JSON header with byte ranges, then the data."""
    if not path.is_file():
        raise CheckpointError(f"{path.name}: not there")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{path.name}: truncated in its header, or not safetensors")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {n: (t["dtype"], tuple(t["shape"])) for n, t in header.items()}
            end = max((t["data_offsets"][1] for t in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path.name}: corrupt header ({error})") from error
    if size != 8 + length + end:
        raise CheckpointError(
            f"{path.name}: {size} bytes where its header says {8 + length + end}"
            + (" (truncated)" if size < 8 + length + end else "")
        )
    return tensors


def _summary(names: list[str], notes: dict[str, str] | None = None) -> str:
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
