"""The test's side of the engine jobs: starts the fork server, sends jobs, reads the results."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
# What is made of content alone is shared by all environments; what an engine leaves is not, so that
# the suite may run in two environments side by side.
SHARED = REPO / ".cache" / "tests"
CACHE = SHARED / Path(sys.prefix).name
BUILTIN = {"LFM2_PLUGIN": "off"}


def search_path() -> str:
    """``PYTHONPATH`` of a process that imports the tests, wherever it is started."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(REPO), given] if given else [str(REPO)])


@dataclass
class Outcome:
    """What one engine job left: its value or its error, and everything it printed."""

    value: Any
    error: str | None
    log: str
    exit: int

    def get(self) -> Any:
        """The value; the log's tail as an AssertionError when the job failed."""
        if self.error is not None:
            raise AssertionError(f"engine job failed: {self.error}\n{self.log[-6000:]}")
        return self.value


class EngineServer:
    """A process with an engine imported that forks one child a job.

    Args:
        folder: takes the files of the jobs and the logs.
        suite: the package whose ``warm`` imports the engine, and that the jobs' modules are in.
        env: added to the environment of every job.
    """

    def __init__(self, folder: Path, suite: str, env: dict[str, str]):
        self.folder = folder
        self.suite = suite
        self.env = env
        self.count = 0
        self.process: subprocess.Popen | None = None
        self.version = ""

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine_common.engine_fork", self.suite],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.folder,
            stderr=(self.folder / "fork_server.log").open("w"),
            env={**os.environ, **self.env, "PYTHONPATH": search_path()},
        )  # fmt: skip
        ready = self.process.stdout.readline()
        assert ready, (self.folder / "fork_server.log").read_text()
        self.version = json.loads(ready)["ready"]

    def run(
        self, call: str, *, env: dict[str, str] | None = None, timeout: float = 240, **args
    ) -> Outcome:
        """Runs ``module:function(**args)`` of the suite in a child and returns its outcome."""
        if self.process is None:
            self.start()
        self.count += 1
        stem = self.folder / f"job{self.count:03d}"
        paths = {k: str(stem.with_suffix(f".{k}")) for k in ("job", "result", "log")}
        Path(paths["job"]).write_text(json.dumps({"call": f"{self.suite}.{call}", "args": args}))
        request = {**paths, "env": env or {}, "timeout": timeout}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        code = json.loads(self.process.stdout.readline())["exit"]
        log = Path(paths["log"]).read_text(errors="replace")
        if not Path(paths["result"]).exists():
            reason = f"timed out after {timeout:.0f} s" if code == 124 else f"died with exit {code}"
            return Outcome(None, reason, log, code)
        answer = json.loads(Path(paths["result"]).read_text())
        return Outcome(answer.get("value"), answer.get("error"), log, code)

    def stop(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait(timeout=30)
            self.process.stdout.close()
