"""The ``lfm2`` command around a stand-in server: ``pytest tests/core/test_cli.py`` (real: tests/engine_vllm)."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lfm2_plugin import __version__
from lfm2_plugin.cli import app, demo
from lfm2_plugin.cli.server import ServerFailed, free_port, serving

FAKE = Path(__file__).with_name("fake_server.py")


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def worker_of(log: Path) -> int:
    return int(re.search(r"WORKER (\d+)", log.read_text())[1])


def gone(pid: int, within: float = 5) -> bool:
    end = time.monotonic() + within
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """``lfm2 demo`` with the stand-in in vLLM's place; returns where its log will be."""
    monkeypatch.delenv("LFM2_PLUGIN", raising=False)
    monkeypatch.setattr(demo.tempfile, "mkdtemp", lambda prefix: str(tmp_path))

    def behave(behaviour: str) -> Path:
        def command(model: str, port: int) -> list[str]:
            return [sys.executable, str(FAKE), str(port), behaviour]

        monkeypatch.setitem(demo.ENGINES, "vllm", demo.Engine("vLLM", command))
        return tmp_path / "server.log"

    return behave


def run_demo(*options: str):
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return CliRunner().invoke(app, ["demo", "--model", "any", *options])
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_version():
    assert CliRunner().invoke(app, ["--version"]).output.strip() == __version__


def test_help_lists_the_commands():
    output = CliRunner().invoke(app, ["--help"]).output
    assert "doctor" in output
    assert "demo" in output


def test_demo(fake_vllm):
    log = fake_vllm("well")
    result = run_demo()
    assert result.exit_code == 0, result.output
    assert re.search(
        r"chat completion.*replied  three.*; 1 tokens in [\d.]+ s, [\d.]+ tokens/s",
        result.output,
        re.S,
    )
    assert re.search(r"streamed.*replied  one two.*; 2 tokens in", result.output, re.S)
    assert "served by  vllm_model.model.Lfm2MoeForCausalLM\n" in result.output
    assert result.output.endswith("server stopped\n")
    assert gone(worker_of(log))


def test_demo_when_the_server_dies(fake_vllm):
    log = fake_vllm("dies")
    result = run_demo()
    assert result.exit_code == 1
    assert "the server ended with exit status 1 before it was ready" in result.output
    assert "CUDA error: not really" in result.output
    assert gone(worker_of(log))


def test_demo_when_a_request_fails(fake_vllm):
    log = fake_vllm("fails")
    result = run_demo()
    assert result.exit_code == 1
    assert "500" in result.output
    assert str(log) in result.output
    assert gone(worker_of(log))


def test_demo_when_another_model_answers(fake_vllm):
    log = fake_vllm("anonymous")
    result = run_demo()
    assert result.exit_code == 1
    assert "another model than ours answered: `lfm2 doctor` tells" in result.output
    assert gone(worker_of(log))


def test_demo_with_the_plugin_switched_off(fake_vllm, monkeypatch: pytest.MonkeyPatch):
    fake_vllm("anonymous")
    monkeypatch.setenv("LFM2_PLUGIN", "off")
    result = run_demo()
    assert result.exit_code == 0, result.output
    assert "served by  vLLM's built-in model (LFM2_PLUGIN=off)" in result.output


def test_demo_without_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(demo.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run_demo()
    assert result.exit_code == 1
    assert "vLLM is not installed in this Python: pip install" in result.output


def test_a_killed_demo_takes_its_server_along(tmp_path: Path):
    code = f"""
import sys
from pathlib import Path
from lfm2_plugin.cli import demo
demo.tempfile.mkdtemp = lambda prefix: {str(tmp_path)!r}
command = lambda model, port: [sys.executable, {str(FAKE)!r}, str(port)]
demo.ENGINES["vllm"] = demo.Engine("vLLM", command)
sys.exit(demo.run("vllm", "any", 0, keep=True))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "Ctrl-C stops it" in line:
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert gone(worker_of(tmp_path / "server.log"))


def test_a_server_that_is_never_healthy(tmp_path: Path):
    port, said = free_port(), []
    command = [sys.executable, str(FAKE), str(port), "never healthy"]
    log = tmp_path / "log"
    with (
        pytest.raises(ServerFailed, match=r"not healthy within 2 s(.|\n)*LFM2-MoE is served by"),
        serving(command, f"http://127.0.0.1:{port}", log, 2, said.append),
    ):
        pytest.fail("the block must not be entered")
    assert gone(worker_of(log))


def fail_with_both_alive(*pids: int) -> None:
    assert all(alive(pid) for pid in pids)
    raise ZeroDivisionError


def test_an_error_in_the_block_stops_the_server(tmp_path: Path):
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, str(FAKE), str(port), "slow"]
    with (
        pytest.raises(ZeroDivisionError),
        serving(command, f"http://127.0.0.1:{port}", log, 30, print) as server,
    ):
        fail_with_both_alive(server.pid, worker_of(log))
    assert gone(server.pid)
    assert gone(worker_of(log))


def test_the_console_script_is_installed():
    script = Path(sys.executable).with_name("lfm2")
    done = subprocess.run(
        [script, "--version"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}
    )
    assert done.stdout.strip() == __version__
