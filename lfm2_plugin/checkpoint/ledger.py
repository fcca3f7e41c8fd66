"""The ledger of a load: every tensor of a checkpoint or of a weight update is accounted for, and so is everything that
the model needs; one error lists all that doesn't fit.

A tensor comes in under any of its spellings (``spellings.py``) and leaves as tensors with the hub's names, each checked
by name, shape and dtype against the model and against what the quantisation config promises for its module. An engine
then says where each of them went, so that none is dropped and no parameter stays empty without an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint.names import (
    WEIGHT,
    Shape,
    expected_tensors,
    is_kv_scale,
    is_quantisable,
    linear_modules,
    optional_tensors,
    translate,
)
from lfm2_plugin.checkpoint.quantisation import PLAIN, QuantisationPlan, WeightFormat, read_plan
from lfm2_plugin.checkpoint.readers import Header, dtype_name, inspect_files
from lfm2_plugin.checkpoint.report import CheckpointReport
from lfm2_plugin.checkpoint.spellings import Spellings, alternate

UNQUANTISED = QuantisationPlan("", {})
_FLOAT = PLAIN.parameters["weight"]

Pieces = list[tuple[str, torch.Tensor]]


class Ledger:
    """One load's book.

    Args:
        arch: the model.
        plan: what the checkpoint's quantisation config promises for each matmul.
    """

    def __init__(self, arch: Lfm2MoeArch, plan: QuantisationPlan = UNQUANTISED) -> None:
        self._arch = arch
        self._needed = expected_tensors(arch)
        self._known = {**optional_tensors(arch), **self._needed}
        self._spellings = Spellings(arch)
        self._plan = plan
        self._entered: dict[str, str] = {}  # the hub's name -> the checkpoint's
        self._formats: dict[str, WeightFormat] = {}  # of the modules that tensors came for
        self._settled: set[str] = set()

    def enter(self, name: str, tensor: torch.Tensor) -> Pieces:
        """Take a tensor in.

        Returns:
            (name of the hub, tensor) of each tensor that it consists of, views of it; none for what is never read.

        Raises:
            CheckpointError: the model has no such tensor, or has it in another shape or dtype; or it came before.
        """
        report = CheckpointReport()
        pieces = self._enter(name, tensor, report)
        report.raise_if_bad()
        return pieces

    def survey(self, tensors: Mapping[str, Header]) -> CheckpointReport:
        """The report on a whole checkpoint, by its headers."""
        report = CheckpointReport()
        for name in sorted(tensors):
            self._enter(name, tensors[name].meta(), report)
        report.missing = self._missing()
        return report

    def settle(self, name: str) -> None:
        """The tensor of that name (of the hub) was loaded, or has no place here for a reason that the caller knows."""
        self._settled.add(name)

    def close(self) -> None:
        """Everything that was entered is settled.

        Raises:
            CheckpointError: lists what the engine's model has no parameter for.
        """
        lost = sorted({told for name, told in self._entered.items() if name not in self._settled})
        CheckpointReport(unplaced=lost).raise_if_bad()

    def finish(self, unfilled: Iterable[str] = (), *, all_experts: bool = True) -> None:
        """Everything came that the model needs.

        Args:
            unfilled: parameters of the engine's model that nothing was loaded into.
            all_experts: False where an engine leaves out the experts of other ranks.

        Raises:
            CheckpointError: lists what did not come, and what stayed empty.
        """
        missing = self._missing()
        if not all_experts:
            missing = [name for name in missing if ".experts." not in name]
        CheckpointReport(missing=missing, unfilled=sorted(unfilled)).raise_if_bad()

    def _enter(self, name: str, tensor: torch.Tensor, report: CheckpointReport) -> Pieces:
        if name.endswith(".inv_freq"):  # a rotary table of old versions; derived, never read
            return []
        shape = tuple(tensor.shape)
        spelling = self._spellings.read(name, shape)
        if spelling.whole is not None and shape != spelling.whole:
            report.wrong_shape[name] = (shape, str(list(spelling.whole)))
            return []
        pieces = spelling.pieces(tensor)
        for hub_name, piece in pieces:
            if hub_name in self._entered:
                report.twice.append(name)
            self._entered[hub_name] = name
            spelled = (name if len(pieces) == 1 else hub_name).rpartition(".")[0]
            self._check(hub_name, name, spelled, piece, report)
        return pieces

    def _check(
        self, hub_name: str, name: str, spelled: str, tensor: torch.Tensor, report: CheckpointReport
    ) -> None:
        """Write down what is wrong with one tensor of the hub's, under the name that the checkpoint has for it.

        ``spelled`` is its module in the checkpoint, by which the quantisation config speaks of it.
        """
        dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
        needed = self._known.get(hub_name)
        allowed = _FLOAT if needed is not None else None
        shapes: tuple[Shape, ...] = () if needed is None else (needed,)
        why = owed = ""
        module, _, parameter = hub_name.rpartition(".")
        if is_kv_scale(hub_name):
            allowed = _FLOAT if self._plan.method or self._plan.kv_scales else None
            shapes, why = self._kv_shapes(hub_name, shape), self._says(PLAIN)
            owed = " (a scale of a KV cache)"
        elif self._is_matmul(module) and parameter != "bias":
            form = self._formats[module] = self._plan.of(spelled)
            allowed = {**form.parameters, **form.optional}.get(parameter)
            rows, columns = self._known[f"{module}.{WEIGHT}"]
            shapes, why = form.shapes(parameter, rows, columns), self._says(form)
            owed = "" if form == PLAIN else f"{why[:-1]} of a {[rows, columns]} matrix)"
        if allowed is None:
            report.unexpected[name] = why
        elif dtype not in allowed:
            report.wrong_dtype[name] = (dtype, " or ".join(sorted(allowed)) + why)
        elif shapes and shape not in shapes:
            right = " or ".join(str(list(one)) for one in shapes)
            report.wrong_shape[name] = (shape, right + owed)

    def _kv_shapes(self, name: str, shape: Shape) -> tuple[Shape, ...]:
        """The shapes that a KV cache's scale may have: one value, or where the config says so one a head.

        vLLM takes one value in any number of dimensions, and llm-compressor's (heads, 1, 1) for values a head
        (``quantization/kv_cache.py``, ``compressed_tensors/compressed_tensors.py``).
        """
        shapes: tuple[Shape, ...] = ((1,) * len(shape), (1,), ())
        if self._plan.kv_per_head:
            scale = translate(name)
            query = scale is not None and scale.parameter == "q_scale"
            heads = self._arch.num_heads if query else self._arch.num_kv_heads
            shapes = (heads, 1, 1), (heads,), *shapes
        return tuple(dict.fromkeys(shapes))

    def _says(self, form: WeightFormat) -> str:
        """The part of an error that says whose promise is broken."""
        if not self._plan.method:
            return " (there is no quantisation config)"
        return f" (the quantisation config says {form.name})"

    def _is_matmul(self, module: str) -> bool:
        weight = f"{module}.weight"
        return weight in self._known and is_quantisable(weight)

    def _missing(self) -> list[str]:
        missing = []
        for name in self._needed:
            module, _, parameter = name.rpartition(".")
            needs = [name]
            if parameter == "weight" and is_quantisable(name):
                form = self._formats.get(module) or self._plan.of(module)
                needs = [f"{module}.{p}" for p in form.parameters]
            missing += [need for need in needs if need not in self._entered]
        return missing


def check_checkpoint(
    arch: Lfm2MoeArch, folder: Path | str, quantisation: Mapping[str, Any] | None = None
) -> QuantisationPlan:
    """Check a folder of weight files by their headers; no weight is read.

    Args:
        arch: the model that the config describes.
        folder: where the files are.
        quantisation: the quantization_config that comes with them.

    Returns:
        What each matmul is, by the names in the files.

    Raises:
        CheckpointError: unreadable files, or missing, unexpected, misshapen or mistyped tensors, all of them.
        UnsupportedQuantisation: the quantization_config is of an unknown method or format, or malformed.
    """
    tensors = inspect_files(folder)
    plan = plan_of(arch, quantisation, tensors)
    report = Ledger(arch, plan).survey(tensors)
    report.raise_if_bad(
        str(folder),
        layout=(arch, {name: header.shape for name, header in tensors.items()}),
        files={name: header.file for name, header in tensors.items()},
    )
    return plan


def plan_of(
    arch: Lfm2MoeArch, quantisation: Mapping[str, Any] | None, tensors: Iterable[str] = ()
) -> QuantisationPlan:
    """What each matmul of a checkpoint is by its quantization_config.

    Args:
        arch: the model.
        quantisation: the quantization_config, None where there is none.
        tensors: the names in the files, where they are known: a config speaks of modules by these. Without them the
            hub's names count and those of llm-compressor.

    Raises:
        UnsupportedQuantisation: an unknown method or format, or a malformed config.
    """
    tensors = set(tensors)
    linears = linear_modules(arch)
    if tensors:
        held = {name.rpartition(".")[0] for name in tensors}
        linears = [m if m in held or alternate(m) not in held else alternate(m) for m in linears]
        linears = [m for m in linears if m != "lm_head" or m in held]
    else:
        linears += sorted({alternate(module) for module in linears} - set(linears))
    return read_plan(quantisation, linears, tensors)
