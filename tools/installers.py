"""How packages come into an environment: with uv, or with pip; either way by pip's settings on this machine.

uv installs SGLang's packages in 19 seconds where pip takes 180 (two busy cores), and keeps one copy of a package for
all environments. It does not read pip's files and variables, so what they say of indexes, wheels on disk, constraints
and certificates is handed on.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

NO_COMPANIONS = Path(__file__).resolve().parent / "no-companions.txt"
SECTIONS = ("global", "install", ":env:")  # of pip's settings, the stronger ones last
# One option of uv for each of the words that pip's setting holds.
OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}
VARIABLES = {
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}


def pip_settings(python: str) -> dict[str, str]:
    """pip's settings for this Python by option, such as ``index-url``: those of its files and of its variables."""
    command = [python, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse_settings(listed)


def parse_settings(listed: str) -> dict[str, str]:
    """The lines of ``pip config list``, ``global.index-url='https://...'``, as a dictionary by option."""
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in found:
            found[section][option] = str(ast.literal_eval(value))
    return {option: value for section in SECTIONS for option, value in found[section].items()}


def uv_options(settings: dict[str, str]) -> list[str]:
    """Options that make uv look where pip would, and choose as pip would: the best version of all indexes."""
    options = ["--index-strategy", "unsafe-best-match"]
    for setting, option in OPTIONS.items():
        options += [word for value in settings.get(setting, "").split() for word in (option, value)]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        options.append("--no-index")
    return options


def uv_environment(settings: dict[str, str]) -> dict[str, str]:
    """This process's environment with pip's settings for the network; uv's own variables come first."""
    given = {VARIABLES[name]: value for name, value in settings.items() if name in VARIABLES}
    return given | os.environ


class Pip:
    """The pip of each environment, and the ``venv`` of the Python that runs this."""

    name = "pip"

    def make(self, folder: Path) -> list[str]:
        """The command that makes an empty environment."""
        return [sys.executable, "-m", "venv", str(folder)]

    def install(self, python: str, torch: str | None, companions: bool) -> list[str]:
        """The command that installs into the environment of ``python``."""
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
        return [*pip, "--progress-bar", "off", "--no-compile"]  # most of it is never imported

    def variables(self) -> dict[str, str]:
        """The environment variables that the commands run with."""
        return dict(os.environ)


class Uv:
    """The uv of an environment of its own."""

    name = "uv"

    def __init__(self, folder: Path) -> None:
        self.program = str(folder / "bin" / "uv")
        self.settings = pip_settings(str(folder / "bin" / "python"))

    def make(self, folder: Path) -> list[str]:
        """The command that makes an empty environment."""
        return [self.program, "venv", "--python", sys.executable, str(folder)]

    def install(self, python: str, torch: str | None, companions: bool) -> list[str]:
        """The command that installs into the environment of ``python``: pip too, which the tests build a wheel with.

        Without ``companions``, torchvision and the like are left out of what the packages require.
        Where the indexes have only the CUDA build of torch, as PyPI itself, uv takes the CPU build from PyTorch's own.
        """
        command = [self.program, "pip", "install", "--python", python, *uv_options(self.settings)]
        command.append("pip")
        if torch is None:
            return command
        if not companions:
            command += ["--overrides", str(NO_COMPANIONS)]
        return command if self.finds_cpu_torch(torch) else [*command, "--torch-backend", "cpu"]

    def variables(self) -> dict[str, str]:
        """The environment variables that the commands run with."""
        return uv_environment(self.settings)

    def finds_cpu_torch(self, torch: str) -> bool:
        """Whether the indexes and folders that pip is set to use have a CPU build of this torch."""
        if sys.platform == "darwin":
            return True  # there is only one build
        command = [self.program, "pip", "compile", "-", "--no-deps", "--no-header", "--quiet"]
        command += ["--no-annotate", "--python", sys.executable, *uv_options(self.settings)]
        done = subprocess.run(
            command, input=torch, capture_output=True, text=True, env=self.variables()
        )
        return done.returncode == 0 and done.stdout.strip().endswith("+cpu")
