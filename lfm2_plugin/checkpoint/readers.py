"""What is in a checkpoint's files, by their headers only: safetensors, or PyTorch's ``.bin`` where there are none."""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from lfm2_plugin.checkpoint.names import Shape
from lfm2_plugin.checkpoint.report import CheckpointError, summary

INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
_FILES, _BIN_FILES = "*.safetensors", "pytorch_model*.bin"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROWS = 4096
_MAX_HEADER = 100 << 20  # bytes; the format's own limit

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""Dtypes as safetensors spells them."""
_SPELLED = {dtype: name for name, dtype in DTYPES.items()}


class Header(NamedTuple):
    """What a file says of one tensor: dtype as safetensors spells it, shape, and the file's name."""

    dtype: str
    shape: Shape
    file: str

    def meta(self) -> torch.Tensor:
        """A tensor like it, without memory."""
        return torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta")


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as safetensors spells it; as torch does where the format lacks it."""
    return _SPELLED.get(dtype, str(dtype).removeprefix("torch."))


def holds_weights(folder: Path) -> bool:
    """Whether there are files in the folder that :func:`inspect_files` reads, or an index of them."""
    return any(any(folder.glob(pattern)) for pattern in (_FILES, _BIN_FILES, INDEX, BIN_INDEX))


def inspect_files(folder: Path | str) -> dict[str, Header]:
    """Every tensor of the checkpoint in a folder; no weight is read.

    With an index file its files are read, whatever lies beside them; else every ``*.safetensors``, else ``*.bin``.

    Raises:
        CheckpointError: no files, or truncated, corrupt or missing ones; all of them are named.
    """
    folder = Path(folder)
    for index, pattern, read in (
        (INDEX, _FILES, _safetensors_header),
        (BIN_INDEX, _BIN_FILES, _bin_header),
    ):
        files = sorted(folder.glob(pattern))
        if files or (folder / index).is_file():
            return _inspect(folder, index, files, read)
    raise CheckpointError(f"There is no *.safetensors file in {folder}. Is it a checkpoint?")


def head_differs(folder: Path | str) -> bool:
    """Whether a checkpoint has a head that isn't a copy of its embedding; reads both, of safetensors only."""
    folder = Path(folder)
    headers = inspect_files(folder)
    if not {_HEAD, _EMBEDDING} <= headers.keys() or not headers[_HEAD].file.endswith(
        ".safetensors"
    ):
        return False
    rows = [_rows_of(folder / headers[name].file, name) for name in (_HEAD, _EMBEDDING)]
    return any(not torch.equal(a, b) for a, b in zip(*rows, strict=True))


def _rows_of(file: Path, name: str) -> Iterator[torch.Tensor]:
    """A matrix some rows at a time: a vocabulary's is hundreds of megabytes."""
    with safe_open(file, "pt") as opened:
        matrix = opened.get_slice(name)
        for first in range(0, matrix.get_shape()[0], _ROWS):
            yield matrix[first : first + _ROWS]


def _inspect(
    folder: Path, index: str, files: list[Path], read: Callable[[Path], dict[str, Header]]
) -> dict[str, Header]:
    weight_map: dict[str, str] = {}
    if (folder / index).is_file():
        weight_map = _read_index(folder / index)
        files = [folder / name for name in sorted(set(weight_map.values()))]
    tensors: dict[str, Header] = {}
    problems: list[str] = []
    for file in files:
        try:
            header = read(file)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        problems += [f"{file.name}: a second {n}" for n in header if n in tensors]
        absent = [n for n, place in weight_map.items() if place == file.name and n not in header]
        if absent:
            problems.append(f"{file.name}: lacks {summary(absent)}, which {index} promises")
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
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not an index of weight files ({type(error).__name__}: {error}). "
            "Download it again."
        ) from error
    outside = sorted({file for file in names.values() if Path(file).name != file})
    if outside:
        raise CheckpointError(f"{path} names files outside its folder: {summary(outside)}.")
    if not names:
        raise CheckpointError(f"{path} names no tensor. Download it again.")
    return names


def _safetensors_header(path: Path) -> dict[str, Header]:
    """One file: 8 bytes of header length, a JSON header with byte ranges, then the data."""
    if not path.is_file():
        raise CheckpointError(f"{path.name}: not there")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{path.name}: truncated in its header, or not safetensors")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_once)
        header.pop("__metadata__", None)
        ranges = [_byte_range(name, entry) for name, entry in header.items()]
        tensors = {n: Header(t["dtype"], tuple(t["shape"]), path.name) for n, t in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: corrupt header ({error})") from error
    end = 0
    for first, last in sorted(ranges):
        if first != end:
            raise CheckpointError(f"{path.name}: corrupt header (bytes {end} to {first})")
        end = last
    if size != 8 + length + end:
        raise CheckpointError(
            f"{path.name}: {size} bytes where its header says {8 + length + end}"
            + (" (truncated)" if size < 8 + length + end else "")
        )
    return tensors


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys all differ."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _byte_range(name: str, entry: dict[str, Any]) -> tuple[int, int]:
    """Where a tensor's data is, checked against its dtype and shape."""
    shape, (first, last) = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{name} has the shape {shape!r}")
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ValueError(f"{name} has the unknown dtype {entry['dtype']!r}")
    if type(first) is not int or type(last) is not int:
        raise ValueError(f"{name} is at {first!r} to {last!r}")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {last - first} bytes for {entry['dtype']} {shape}")
    return first, last


def _bin_header(path: Path) -> dict[str, Header]:
    """One pickle of PyTorch, of which nothing is executed and, in the zip form, no data is read."""
    if not path.is_file():
        raise CheckpointError(f"{path.name}: not there")
    try:
        tensors = torch.load(
            path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
        return {
            name: Header(dtype_name(tensor.dtype), tuple(tensor.shape), path.name)
            for name, tensor in tensors.items()
        }
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name}: a pickle with more in it than tensors, which is not read. Save it as safetensors"
        ) from error
    except (RuntimeError, ValueError, EOFError, AttributeError, KeyError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path.name}: not readable as PyTorch's ({type(error).__name__}: {reason})"
        ) from error
