"""``vllm serve`` for the length of a block."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lfm2_plugin.cli.demo import NAME
from lfm2_plugin.cli.server import free_port, serving
from tests.engine_vllm.engine_env import ENV as ENGINE_ENV

ENV = {k: v for k, v in ENGINE_ENV.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
CLI = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def command(*words: str) -> list[str]:
    """A vllm command line with the suite's environment."""
    return ["env", *(f"{k}={v}" for k, v in ENV.items()), *CLI, *words]


@contextmanager
def served(model: Path, options: list[str], log: Path, timeout: float = 300) -> Iterator[str]:
    """Base address of a server for ``model``, which it knows under the demo's name."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = ["serve", str(model), "--port", str(port), "--served-model-name", NAME, *options]
    with serving(command(*words), url, log, timeout, lambda line: None):
        yield url
