"""The examples and ``lfm2 demo`` as a user runs them, in the environment of the running Python."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lfm2_plugin.cli.server import free_port

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
BIN = Path(sys.executable).parent
SWITCHES = ("LFM2_PLUGIN", "VLLM_PLUGINS", "SGLANG_PLUGINS")


def environment(**more: str) -> dict[str, str]:
    variables = {k: v for k, v in os.environ.items() if k not in SWITCHES}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    # One thread: another suite may have the other core, and two threads that wait for each other there take ten minutes
    # for what one does in one.
    fixed = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_COLOR": "0",
    }
    return {**variables, "PATH": path, **fixed, **more}


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """The standard output of a command that has to succeed."""
    done = subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@contextlib.contextmanager
def kept_demo(*options: str, **variables: str) -> Iterator[tuple[str, str]]:
    """``lfm2 demo --keep``: its address and what it printed until it waited; killed at the end.

    Args:
        options: further ones of the engine's server.
        variables: of its environment.
    """
    port, printed = free_port(), []
    process = subprocess.Popen(
        [BIN / "lfm2", "demo", "--keep", "--port", str(port), "--", *options],
        env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        for line in process.stdout:
            printed.append(line)
            if "Ctrl-C stops it" in line:
                break
        else:
            pytest.fail("lfm2 demo ended early:\n" + "".join(printed))
        yield f"http://127.0.0.1:{port}", "".join(printed)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def demo_answers_right(printed: str, served_by: str) -> None:
    """What ``lfm2 demo`` printed: two right answers with their speeds, and the class that gave them."""
    assert re.search(rf"served by +{re.escape(served_by)}$", printed, re.MULTILINE)
    assert printed.count("\n  right; ") == 2, printed
    assert len(re.findall(r"[\d.]+ tokens/s", printed)) == 2


def openai_client_understands(url: str) -> None:
    printed = run(sys.executable, EXAMPLES / "openai_client.py", url)
    assert "chat: apple river star\n" in printed
    assert "streamed: apple river star\n" in printed
    assert "tool call: find_weather({'city': 'Paris'})" in printed


def offline_answers_right(example: str, *options: str) -> None:
    printed = run(sys.executable, EXAMPLES / example, *options)
    assert printed.count("generate: ") == 2
    assert "chat: 'Repeat: apple river star' -> 'apple river star'" in printed
    assert "chat: 'What is park?' -> '88'" in printed
