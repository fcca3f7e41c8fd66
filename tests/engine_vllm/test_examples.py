"""The examples and ``lfm2 demo`` with the demo model: ``pytest tests/engine_vllm/test_examples.py``."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lfm2_plugin.cli.server import free_port

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
BIN = Path(sys.executable).parent


def environment() -> dict[str, str]:
    variables = {k: v for k, v in os.environ.items() if k not in ("LFM2_PLUGIN", "VLLM_PLUGINS")}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**variables, "PATH": path, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_COLOR": "0"}


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """The standard output of a command that has to succeed."""
    done = subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def kept_demo():
    """``lfm2 demo --keep``: its address and what it printed until it waited; killed at the end."""
    port, printed = free_port(), []
    process = subprocess.Popen(
        [BIN / "lfm2", "demo", "--keep", "--port", str(port)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
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


def test_the_demo_answers_right_and_names_our_class(kept_demo: tuple[str, str]):
    _, printed = kept_demo
    assert re.search(r"served by +vllm_model\.model\.Lfm2MoeForCausalLM$", printed, re.MULTILINE)
    assert printed.count("\n  right; ") == 2, printed
    assert len(re.findall(r"[\d.]+ tokens/s", printed)) == 2


def test_openai_client(kept_demo: tuple[str, str]):
    url, _ = kept_demo
    printed = run(sys.executable, EXAMPLES / "openai_client.py", url)
    assert "chat: apple river star\n" in printed
    assert "streamed: apple river star\n" in printed
    assert "tool call: find_weather({'city': 'Paris'})" in printed


def test_offline():
    printed = run(sys.executable, EXAMPLES / "offline_vllm.py")
    assert printed.count("generate: ") == 2
    assert "chat: 'Repeat: apple river star' -> 'apple river star'" in printed
    assert "chat: 'What is park?' -> '88'" in printed


def test_run_batch(tmp_path: Path):
    printed = run(EXAMPLES / "run_batch.sh", "", tmp_path / "out.jsonl", cwd=tmp_path)
    for words in ("apple river star", "star moon fox", "queen snow garden"):
        assert f"{words.replace(' ', '-')} -> {words}\n" in printed
