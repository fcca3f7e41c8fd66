"""A checkpoint's files as the processes of an engine use them, without transformers."""

import shutil
from pathlib import Path

import torch


def named_tensors(folder: str, names: list | None = None) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint of one file, all or the named ones.

    A name may be given as [name in the file, name that the engine is told].
    """
    from safetensors.torch import load_file

    (file,) = Path(folder).glob("*.safetensors")
    tensors = load_file(file)
    pairs = [name if isinstance(name, list) else [name, name] for name in names or tensors]
    return [(told, tensors[name]) for name, told in pairs]


def copy_without_weights(source: Path, target: Path) -> None:
    """The config and whatever else lies beside a checkpoint's weights."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copy(path, target / path.name)
