"""Try every install line of README.md in fresh environments: ``make test-install``.

    python3 tools/test_install.py                  # everything
    python3 tools/test_install.py --only uv        # what has "uv" in its label; --list shows the labels

A line is tried with the installer it names; those with pip are tried with an old pip and the newest, and with uv where
they need no index of their own. Lines for GPUs are resolved only, since CUDA comes with them in gigabytes; the others
are installed with the lowest Python and resolved with the rest. What was installed has to work: `lfm2 doctor` without a
fault and `lfm2 demo`, or without an engine `lfm2 doctor` with the fault that says so. Needs Python 3.11+, a package
index, 20 GB of disk and half an hour. Exit status 1 if a line failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKER = "<!-- `make test-install`"
PYTHONS = ("3.11", "3.12", "3.13")
OLD_PIP = "23.2.1"  # what Python 3.11 and 3.12 came with
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
GPU_EXTRAS = ("vllm", "sglang")
SWITCHES = ("LFM2_PLUGIN", "LFM2_PLUGIN_OPS", "VLLM_PLUGINS", "SGLANG_PLUGINS", "PYTHONPATH")
LIMIT_S = 1200


class Failed(RuntimeError):
    """A command did not do what it should; the text shows it and the end of its output."""


class Skipped(RuntimeError):
    """Something that this machine lacks; the text says what."""


@dataclass(frozen=True)
class Line:
    """An entry of README.md's install block: its comment, and the commands below it."""

    title: str
    commands: tuple[str, ...]

    @property
    def extra(self) -> str:
        """The extra that it installs; empty without one."""
        found = re.search(r"\.\[([\w-]+)\]", self.commands[0])
        return found[1] if found else ""

    @property
    def tools(self) -> tuple[str, ...]:
        """The installers that it is tried with."""
        if self.commands[0].startswith("uv "):
            return ("uv",)
        pips = (f"pip {OLD_PIP}", "newest pip")
        return pips if CPU_INDEX in self.commands[0] else (*pips, "uv")


@dataclass(frozen=True)
class Attempt:
    """A line with one Python, one installer and one form of this project."""

    line: Line
    python: str
    tool: str
    source: str
    dry: bool

    @property
    def label(self) -> str:
        """What the report calls it."""
        how = "resolved" if self.dry else "installed"
        return f"{self.line.title} | {self.tool} | Python {self.python} | from {self.source}, {how}"


def readme_lines(text: str) -> list[Line]:
    """The entries of the marked block."""
    block = text.split(MARKER, 1)[1].split("```bash\n", 1)[1].split("```", 1)[0]
    entries = re.findall(r"^# (.+)\n((?:[^#\n].*\n)+)", block, re.MULTILINE)
    return [Line(title, tuple(commands.splitlines())) for title, commands in entries]


def attempts(lines: list[Line]) -> Iterator[Attempt]:
    """The table: every line, Python and installer; the old pip with the lowest Python only."""
    lowest = PYTHONS[0]
    for line in lines:
        for python in PYTHONS:
            for tool in line.tools:
                if tool == f"pip {OLD_PIP}" and python != lowest:
                    continue
                dry = line.extra in GPU_EXTRAS or bool(line.extra and python != lowest)
                yield Attempt(line, python, tool, "wheel", dry)
        if not line.extra:
            for source in ("clone", "sdist", "git"):
                yield Attempt(line, lowest, "newest pip", source, False)


def run(
    command: list[str], environment: dict[str, str], cwd: Path | None = None, status: int = 0
) -> str:
    """The output of a command that has to end with the given status.

    Raises:
        Failed: it did not.
    """
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, timeout=LIMIT_S,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(f"$ {shlex.join(command)}\nnot done within {LIMIT_S} s") from None
    if done.returncode != status:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise Failed(f"$ {shlex.join(command)}\nexit status {done.returncode}\n{tail}")
    return done.stdout


def find_python(version: str) -> str:
    """An interpreter of that version: on the PATH, or one of pyenv's.

    Raises:
        Skipped: there is none.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    candidates = [f"python{version}", *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    code = "import sys, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(shutil.which, candidates):
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if done.stdout.strip() == version:  # a shim of pyenv's may stand for nothing
            return candidate
    raise Skipped(f"no Python {version} here")


def cpu_index_is_reachable() -> bool:
    """Whether torch's index of CPU builds answers."""
    try:
        urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=10).close()
    except (urllib.error.URLError, TimeoutError):
        return False
    return True


class Workshop:
    """A temporary folder with this project in every form that can be installed, and fresh environments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in SWITCHES},
            "PIP_CACHE_DIR": str(folder / "pip-cache"),
            "UV_CACHE_DIR": str(folder / "uv-cache"),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "COLUMNS": "200",
        }
        self.stand_in = "" if cpu_index_is_reachable() else os.environ.get("PIP_FIND_LINKS", "")
        self.has_cpu_torch: dict[str, bool] = {}
        self.tools = self._venv("tools", sys.executable)
        self.uv = str(self.tools / "bin" / "uv")
        run([*self._pip(self.tools), "--quiet", "build", "uv"], self.environment)
        self.sources = self._sources()

    def _venv(self, name: str, python: str, uv: bool = False) -> Path:
        """A fresh environment as pip's users make it, or as uv's do: without pip."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        maker = [self.uv, "venv", "--python", python] if uv else [python, "-m", "venv"]
        run([*maker, str(folder)], self.environment)
        return folder

    def _pip(self, venv: Path) -> list[str]:
        return [str(venv / "bin" / "python"), "-m", "pip", "install"]

    def _uv_pip(self, venv: Path) -> list[str]:
        return [self.uv, "pip", "install", "--python", str(venv / "bin" / "python")]

    def _sources(self) -> dict[str, str]:
        """What stands for the "." of README.md, by the name of the form."""
        clone = self.folder / "clone"
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:  # an unpacked sdist
            shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".venvs", "build", "dist"))
        for name in filter(None, done.stdout.split("\0")):
            if (ROOT / name).is_file():
                (clone / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, clone / name)
        dist = self.folder / "dist"
        build = [str(self.tools / "bin" / "python"), "-m", "build", "--outdir", str(dist)]
        run([*build, str(clone)], self.environment)
        if shutil.which("git"):
            git = ["git", "-c", "user.name=x", "-c", "user.email=x@localhost"]
            for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
                run([*git, *words], self.environment, clone)
        return {
            "clone": str(clone),
            "wheel": str(next(dist.glob("*.whl"))),
            "sdist": str(next(dist.glob("*.tar.gz"))),
            "git": f"git+file://{clone}",
        }

    def attempt(self, attempt: Attempt) -> None:
        """Carry one out.

        Raises:
            Failed: a command did not do what it should.
            Skipped: this machine lacks something for it.
        """
        python = find_python(attempt.python)
        if attempt.source == "git" and shutil.which("git") is None:
            raise Skipped("no git here")
        venv = self._venv("venv", python, uv=attempt.tool == "uv")
        if attempt.line.extra.endswith("-cpu"):
            self._need_cpu_torch(attempt.python, venv)
        if attempt.tool != "uv":
            pip = "pip" if attempt.tool == "newest pip" else f"pip=={OLD_PIP}"
            run([*self._pip(venv), "--quiet", "--upgrade", pip], self.environment)
        for command in attempt.line.commands:
            run(self.command(command, attempt, venv), self.environment, self.folder)
        if not attempt.dry:
            self.check(venv, bool(attempt.line.extra))

    def command(self, line: str, attempt: Attempt, venv: Path) -> list[str]:
        """README.md's command for the given form of the project, in the given environment."""
        words = shlex.split(line)
        words = words[words.index("install") + 1 :]
        source = self.sources[attempt.source]
        for index, word in enumerate(words):
            extra = word.removeprefix(".")
            if word == "." or word.startswith(".["):
                git = f"lfm2-plugin{extra} @ {source}"
                words[index] = git if attempt.source == "git" else f"{source}{extra}"
        if self.stand_in:
            for option in ("--extra-index-url", "--torch-backend"):
                if option in words:
                    at = words.index(option)
                    words[at : at + 2] = ["--find-links", self.stand_in]
        dry = ["--dry-run"] * attempt.dry
        if attempt.tool == "uv":
            return [*self._uv_pip(venv), *dry, *words]
        return [*self._pip(venv), *dry, *words]

    def _need_cpu_torch(self, version: str, venv: Path) -> None:
        """Skip where no CPU build of the torch that the extras want is to be had for a Python."""
        wanted = re.search(r'"torch(==[\d.]+)"', (ROOT / "setup.py").read_text())
        requirement = f"torch{wanted[1] if wanted else ''}+cpu"
        if version not in self.has_cpu_torch:
            links = ["--find-links", self.stand_in] if self.stand_in else []
            index = links or ["--torch-backend", "cpu"]
            command = [*self._uv_pip(venv), "--dry-run", "--no-deps", *index, requirement]
            try:
                run(command, self.environment)
            except Failed:
                self.has_cpu_torch[version] = False
            else:
                self.has_cpu_torch[version] = True
        if not self.has_cpu_torch[version]:
            raise Skipped(f"no {requirement} for Python {version} within reach")

    def check(self, venv: Path, with_engine: bool) -> None:
        """That what was installed works, or says what is missing."""
        folders = (str(venv / "bin"), str(self.tools / "bin"), self.environment["PATH"])
        path = os.pathsep.join(folders)
        environment = {**self.environment, "PATH": path}
        lfm2 = str(venv / "bin" / "lfm2")
        if with_engine:
            run([lfm2, "doctor", "--fix"], environment, self.folder)
            run([lfm2, "doctor"], environment, self.folder)
            run([lfm2, "demo"], environment, self.folder)
            return
        report = run([lfm2, "doctor"], environment, self.folder, status=1)
        if "no engine is installed in this Python" not in report:
            raise Failed(f"lfm2 doctor doesn't say that an engine is missing:\n{report}")
        model = Path(run([lfm2, "demo", "--path"], environment, self.folder).strip())
        if not (model / "model.safetensors").exists():
            raise Failed(f"lfm2 demo --path names {model}, which holds no model")


def report(table: list[Attempt], workshop: Workshop) -> int:
    """Try all, one line each; how many failed."""
    failures = 0
    for attempt in table:
        start, details = time.monotonic(), ""
        try:
            workshop.attempt(attempt)
            result = "ok"
        except Skipped as why:
            result, details = "skipped", f": {why}"
        except Failed as why:
            result, failures = "FAILED", failures + 1
            details = "\n    " + str(why).replace("\n", "\n    ")
        seconds = time.monotonic() - start
        print(f"{result:8}{seconds:5.0f} s  {attempt.label}{details}", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", default="", metavar="WORD", help="labels that hold it")
    parser.add_argument("--list", action="store_true", help="print the labels and end")
    arguments = parser.parse_args()
    lines = readme_lines((ROOT / "README.md").read_text(encoding="utf-8"))
    table = [attempt for attempt in attempts(lines) if arguments.only in attempt.label]
    if arguments.list:
        print("\n".join(attempt.label for attempt in table))
        return 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lfm2-install-") as folder:
        workshop = Workshop(Path(folder))
        if workshop.stand_in:
            print(f"{CPU_INDEX} can't be reached: {workshop.stand_in} (PIP_FIND_LINKS) instead")
        failures = report(table, workshop)
    print(f"{len(table)} tried in {(time.monotonic() - start) / 60:.0f} min, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
