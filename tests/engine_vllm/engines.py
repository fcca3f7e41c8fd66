"""The test's side of the engine jobs: starts the fork server, sends jobs, reads the results."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPO = HERE.parents[1]
# A cache for each environment, so that the suite may run in two of them side by side.
CACHE = REPO / ".cache" / "tests" / Path(sys.prefix).name

# One thread per engine: two engines may run side by side, and the order of float additions is fixed.
BASE_ENV = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two workers on one NUMA node
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_AOT_COMPILE": "0",  # its artefacts fail to load back on the CPU: compiles every time
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # lets a test run a function on the workers' models
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
BUILTIN = {"LFM2_PLUGIN": "off"}


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
    """A process with vLLM imported that forks one child a job."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0
        self.process: subprocess.Popen | None = None
        self.version = ""

    def start(self) -> None:
        env = {**os.environ, **BASE_ENV, "VLLM_CACHE_ROOT": str(CACHE / "vllm")}
        env["TORCHINDUCTOR_CACHE_DIR"] = str(CACHE / "inductor")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "engine_fork.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=self.folder,
            stderr=(self.folder / "fork_server.log").open("w"),
        )  # fmt: skip
        ready = self.process.stdout.readline()
        assert ready, (self.folder / "fork_server.log").read_text()
        self.version = json.loads(ready)["ready"]

    def run(
        self, call: str, *, env: dict[str, str] | None = None, timeout: float = 240, **args
    ) -> Outcome:
        """Runs ``module:function(**args)`` in a child and returns its outcome."""
        if self.process is None:
            self.start()
        self.count += 1
        stem = self.folder / f"job{self.count:03d}"
        paths = {k: str(stem.with_suffix(f".{k}")) for k in ("job", "result", "log")}
        Path(paths["job"]).write_text(json.dumps({"call": call, "args": args}))
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
