"""The parent's end: one :class:`Side` for each worker process, and the order of their turns."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engines import Flags
from benchmarks.sides import side_environment, wrong_class
from benchmarks.workloads import Sample, Workload

_ROOT = Path(__file__).resolve().parents[1]


class Side:
    """A worker process that serves one side.

    Args:
        label: how it is called in tables.
        side: ``ours`` or ``builtin``.
        log: file for what the engine prints.
        environment: variables to set on top of this process's.
        python: interpreter of the environment that holds the engine.
        timeout: seconds that one command may take.
        engine: which engine it will start.
    """

    def __init__(
        self,
        label: str,
        side: str,
        log: Path,
        environment: dict[str, str] | None = None,
        python: str = sys.executable,
        timeout: float = 1200.0,
        engine: str = "vllm",
    ) -> None:
        self.label, self.side, self.log, self.timeout = label, side, log, timeout
        self.model_class = ""
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                cwd=_ROOT,
                env=side_environment(side, engine) | (environment or {}),
                start_new_session=True,
                bufsize=0,
            )
        self._buffer = b""

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, engine: str, flags: Flags) -> float:
        """Start the engine; seconds that took.

        Raises:
            RuntimeError: it failed, or the class of another side serves.
        """
        answer = self.ask(
            "start", engine=engine, flags=asdict(flags) | {"folder": str(flags.folder)}
        )
        self.model_class = answer["model_class"]
        if problem := wrong_class(self.side, self.model_class):
            raise RuntimeError(problem)
        return float(answer["seconds"])

    def ask(self, op: str, **arguments: Any) -> Any:
        """Send one command and wait for its answer.

        Raises:
            RuntimeError: the worker reported an error, ended, or did not answer in time (it is then
                stopped).
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps({"op": op} | arguments) + "\n").encode())
        except BrokenPipeError:
            raise self._failed(f"{op}: the worker has ended") from None
        answer = json.loads(self._line(op))
        if "error" in answer:
            raise self._failed(f"{op} failed:\n{answer['error']}")
        return answer["result"]

    def _line(self, op: str) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + self.timeout
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                self.stop()
                raise self._failed(f"{op}: no answer within {self.timeout:.0f} s, stopped")
            piece = os.read(self._process.stdout.fileno(), 1 << 20)
            if not piece:
                raise self._failed(f"{op}: the worker ended with status {self._process.wait()}")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _failed(self, what: str) -> RuntimeError:
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
        return RuntimeError(f"{self.label}: {what}\n--- end of {self.log}:\n{tail}")

    def cpu_seconds(self) -> float:
        """CPU time that the worker and its children have used so far."""
        total = 0.0
        root = psutil.Process(self._process.pid)
        for process in (root, *root.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    def stop(self) -> None:
        """End the worker and every process of its session."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@dataclass
class Pairs:
    """The samples of one workload, pair by pair.

    Attributes:
        workload: what was run.
        a, b: one sample a pair and side.
        idle: share of a core that the waiting side used.
        others: share of a core that processes outside the comparison used.
    """

    workload: Workload
    a: list[Sample] = field(default_factory=list)
    b: list[Sample] = field(default_factory=list)
    idle: float = 0.0
    others: float = 0.0


@dataclass
class _Load:
    """CPU seconds since it was made: of the waiting side, and of everything but the two sides."""

    working: Side
    waiting: Side

    def __post_init__(self) -> None:
        self._start = self._now()

    def _now(self) -> tuple[float, float]:
        waiting = self.waiting.cpu_seconds()
        times = psutil.cpu_times()
        busy = times.user + times.nice + times.system
        return waiting, busy - waiting - self.working.cpu_seconds()

    def used(self) -> tuple[float, float]:
        waiting, others = self._now()
        return waiting - self._start[0], max(0.0, others - self._start[1])


def run_pairs(
    workload: Workload,
    sides: tuple[Side, Side],
    pairs: int,
    tick: Callable[[], None] = lambda: None,
) -> Pairs:
    """Measure a workload on two sides in turn: A B, B A, A B, ... after one untimed turn each.

    Args:
        workload: what to run.
        sides: A and B.
        pairs: timed turns of each side.
        tick: called after every turn.
    """
    result = Pairs(workload)
    samples: dict[Side, list[Sample]] = {sides[0]: result.a, sides[1]: result.b}
    for side in sides:
        side.ask("prepare", workload=asdict(workload), turns=pairs + 1)
        side.ask("turn", number=0)
        tick()
    elapsed = 0.0
    for pair in range(1, pairs + 1):
        # The order changes from pair to pair, so that a drift of the machine favours neither.
        for side in sides if pair % 2 else sides[::-1]:
            other = sides[side is sides[0]]
            load, start = _Load(side, other), time.monotonic()
            samples[side].append(Sample(**side.ask("turn", number=pair)))
            elapsed += time.monotonic() - start
            waiting, others = load.used()
            result.idle += waiting
            result.others += others
            tick()
    for side in sides:
        side.ask("finish")
    result.idle /= elapsed
    result.others /= elapsed
    return result
