"""A server process for the length of a ``with`` block: started, waited for, and stopped whatever happens."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

STOP_GRACE_S = 20
LOG_TAIL_LINES = 25
PROGRESS_S = 15
# How a traceback ends, in a log or plain. An engine's parent process raises one that only points to its child's.
EXCEPTION = re.compile(
    r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception): (?!.*root cause).+)$", re.MULTILINE
)


class ServerFailed(RuntimeError):
    """The server can't be started, did not come up, or died: one line, with the end of its log as a note."""


def free_port(wanted: int = 0) -> int:
    """A TCP port that was free a moment ago: the one asked for, or any.

    Raises:
        OSError: the one asked for is taken, or not for us.
    """
    with socket.socket() as probe:
        # As servers do: a port whose last connections linger is free, one that is listened on is not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", wanted))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(
    command: list[str], url: str, log: Path, timeout_s: float, progress: Callable[[str], None]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server, enter the block once ``url``/health answers, stop the server at the end of the block.

    Args:
        command: starts the server in the foreground.
        url: its base address, such as ``http://127.0.0.1:8000``.
        log: takes what it prints.
        timeout_s: how long it may take to become healthy.
        progress: told every few seconds what the server is doing.

    Raises:
        ServerFailed: it ended, or was not healthy in time.
    """
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, so that its workers can be stopped with it
        )
        try:
            _wait(process, url, log, timeout_s, progress)
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything it started: asked first, killed when that takes too long."""
    for number, patience in (
        (signal.SIGINT, STOP_GRACE_S),
        (signal.SIGTERM, 5),
        (signal.SIGKILL, 5),
    ):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # workers that outlived their parent


def tail(log: Path, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def failure(what: str, log: Path) -> ServerFailed:
    """The error for a server that does not serve: what happened, why by its log, and where that is."""
    raised = EXCEPTION.findall(log.read_text(errors="replace"))
    why = raised[-1] if raised else tail(log, 1)
    error = ServerFailed(f"{what}: {why[:400]} (log: {log}; `lfm2 doctor` checks the installation)")
    error.add_note(f"The end of the log:\n{tail(log)}")
    return error


def _wait(
    process: subprocess.Popen[bytes],
    url: str,
    log: Path,
    timeout_s: float,
    progress: Callable[[str], None],
) -> None:
    start = said = time.monotonic()
    news = ""
    while time.monotonic() - start < timeout_s:
        if process.poll() is not None:
            raise failure(
                f"the server ended with exit status {process.returncode} before it was ready", log
            )
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        last, waited = tail(log, 1).split("] ", 1)[-1][:90], time.monotonic() - said
        if (last != news and waited > 2) or waited > PROGRESS_S:
            progress(f"{time.monotonic() - start:4.0f} s  {'...' if last == news else last}")
            news, said = last, time.monotonic()
        time.sleep(0.5)
    raise failure(f"the server was not healthy within {timeout_s:.0f} s", log)
