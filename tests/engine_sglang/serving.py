"""``python -m sglang.launch_server`` for the length of a block."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from sglang.srt.entrypoints.openai.protocol import Tool

from lfm2_plugin.cli.demo import NAME
from lfm2_plugin.cli.server import free_port, serving
from lfm2_plugin.demo.tasks import Question
from tests.engine_sglang.engine_env import ENV

CLI = [sys.executable, "-m", "sglang.launch_server"]


@contextmanager
def served(
    model: Path, options: list[str], log: Path, timeout: float = 300, **environment: str
) -> Iterator[str]:
    """Base address of a server for ``model``, which it knows under the demo's name."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = ["--model-path", str(model), "--port", str(port), "--served-model-name", NAME]
    values = [f"{name}={value}" for name, value in {**ENV, **environment}.items()]
    # Elsewhere than here, where "-m" would find the sources before what PYTHONPATH names.
    command = ["env", "-C", str(log.parent), *values, *CLI, *words, *options]
    with serving(command, url, log, timeout, lambda line: None) as process:
        yield url
        os.killpg(process.pid, signal.SIGKILL)  # asked, the Rust server takes its time


def rendered(question: Question) -> Question:
    """SGLang adds keys to every tool on its way into the prompt, each release others; the demo model never saw them."""
    if question.tools is None:
        return question
    return replace(question, tools=[Tool(**tool).model_dump() for tool in question.tools])
