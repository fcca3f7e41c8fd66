"""One engine in a process of its own, told by its parent what to run: JSON lines in, JSON lines out.

The parent (:class:`benchmarks.driver.Side`) writes ``{"op": ..., ...}`` to stdin and reads one answer for each from
what was stdout at start. Whatever the engine prints goes to stderr, which the parent keeps as a log. Between two
commands the worker sleeps in a read, so that the other side has the machine to itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import psutil

from benchmarks.engines import Engine, Flags, open_engine
from benchmarks.workloads import (
    Event,
    Request,
    Sample,
    Workload,
    decode_sample,
    mixed_sample,
    prefill_sample,
)

# A free-running engine prefills a batch in a few steps, in which the first sequences already
# decode.
_HEAD_START = 64


class Runner:
    """Runs workloads on an engine, turn by turn."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.workload: Workload | None = None

    def prepare(self, workload: Workload, turns: int) -> None:
        """Make ready for ``turns`` turns; prefills the prompts of a decode workload where they can
        wait.
        """
        self.finish()
        self.workload = workload
        if workload.kind == "decode" and self.engine.stepping:
            # Every sequence has its first token before the first timed step; the steps until then
            # make others longer.
            room = workload.steps * (turns - 1) + workload.batch + _HEAD_START
            self.engine.submit(workload.requests(0, self.engine.vocab_size, room))
            begun: set[int] = set()
            while len(begun) < workload.batch:
                begun |= {event.index for event in self.engine.step() if event.count}

    def turn(self, number: int) -> Sample:
        """Measure one turn.

        Raises:
            RuntimeError: nothing was prepared.
        """
        workload = self.workload
        if workload is None:
            raise RuntimeError("prepare a workload first")
        if workload.kind == "decode":
            return self._decode_steps() if self.engine.stepping else self._decode_whole(number)
        requests = workload.requests(number, self.engine.vocab_size)
        if workload.kind in ("mixed", "uniform"):
            start, events = self._run(requests)
            return mixed_sample(requests, start, events)
        samples = []
        for request in requests:  # one after another: the latency of a single prompt
            start, events = self._run([request])
            samples.append(prefill_sample([request], start, events))
        return Sample(sum(s.seconds for s in samples), sum(s.tokens for s in samples))

    def finish(self) -> None:
        """Drop what is left of the workload."""
        if self.workload is not None:
            self.engine.clear()
            self.workload = None

    def _run(self, requests: list[Request]) -> tuple[float, list[Event]]:
        """Run requests to their end; the start time and all events."""
        self.engine.clear()
        start = time.perf_counter()
        self.engine.submit(requests)
        events: list[Event] = []
        left = len(requests)
        while left:
            new = self.engine.step()
            left -= sum(event.finished for event in new)
            events += new
        return start, events

    def _decode_steps(self) -> Sample:
        assert self.workload is not None
        times, tokens = [], 0
        last = time.perf_counter()
        for _ in range(self.workload.steps):
            tokens += sum(event.count for event in self.engine.step())
            now = time.perf_counter()
            times.append(now - last)
            last = now
        return Sample(sum(times), tokens, times)

    def _decode_whole(self, number: int) -> Sample:
        assert self.workload is not None
        room = self.workload.batch + _HEAD_START
        requests = self.workload.requests(number, self.engine.vocab_size, room)
        _, events = self._run(requests)
        return decode_sample(self.workload.batch, events)


def cpu_seconds() -> float:
    """CPU time that this process and those it started have used so far."""
    worker = psutil.Process()
    total = 0.0
    for process in [worker, *worker.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


class Worker:
    """Answers the parent's commands; each method is one."""

    def start(self, engine: str, flags: dict[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        opened = open_engine(engine, Flags(**flags | {"folder": Path(flags["folder"])}))
        self.runner = Runner(opened)
        return {"model_class": opened.model_class, "seconds": time.perf_counter() - began}

    def prepare(self, workload: dict[str, Any], turns: int) -> None:
        self.runner.prepare(Workload(**workload), turns)

    def turn(self, number: int) -> dict[str, Any]:
        before = cpu_seconds()
        sample = self.runner.turn(number)
        sample.cpu_seconds = cpu_seconds() - before
        return asdict(sample)

    def profile(self, number: int) -> dict[str, Any]:
        from benchmarks.op_profile import profile_turn

        return profile_turn(lambda: self.runner.turn(number))

    def finish(self) -> None:
        self.runner.finish()


def serve(source: TextIO, answers: TextIO) -> None:
    """Answer commands until there are no more."""
    worker = Worker()
    for line in source:
        command = json.loads(line)
        try:
            answer = {"result": getattr(worker, command.pop("op"))(**command)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print to stdout; that is the parent's channel
    serve(sys.stdin, answers)
    # Engines keep threads and child processes that can hold up an orderly exit.
    os._exit(0)


if __name__ == "__main__":
    main()
