"""Fixtures of both engine suites: one fork server a session, and a function that runs one engine.

A suite's conftest imports them and has a fixture ``suite`` that names itself.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine_common import interpreted
from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.engines import CACHE, EngineServer, Outcome


@dataclass(frozen=True)
class Suite:
    """A package with the modules ``warm`` and ``engine_jobs``, and the environment of its engines."""

    package: str
    env: dict[str, str]


@pytest.fixture(scope="session")
def server(tmp_path_factory, suite: Suite):
    yield from started(tmp_path_factory, suite)


@pytest.fixture(scope="session")
def run(server):
    """Starts one engine, runs steps, returns the value: run("alpha", {"dtype": ...}, steps)."""
    return runner(server)


@pytest.fixture(scope="module")
def interpreting_server(tmp_path_factory, suite: Suite):
    """As ``server``, of a process that has had Triton's interpreter since it imported Triton."""
    yield from started(tmp_path_factory, suite, **interpreted.ENV)


@pytest.fixture(scope="module")
def interpreting_run(interpreting_server):
    """As ``run``, of engines in Triton's interpreter."""
    return runner(interpreting_server)


def started(tmp_path_factory, suite: Suite, **env: str) -> Iterator[EngineServer]:
    folder = tmp_path_factory.mktemp("engines")
    server = EngineServer(folder, suite.package, {**suite.env, **env})
    yield server  # the first job starts it
    server.stop()


def runner(server: EngineServer) -> Callable[..., dict]:
    def start(model: str | Path, engine: dict, steps: list[dict], **options) -> dict:
        return outcome(model, engine, steps, **options).get()

    def outcome(model: str | Path, engine: dict, steps: list[dict], **options) -> Outcome:
        folder = str(checkpoint(model)) if isinstance(model, str) else str(model)
        begin = time.monotonic()
        result = server.run(
            "engine_jobs:run_engine", model=folder, engine=engine, steps=steps, **options
        )
        if os.environ.get("LFM2_TEST_TIMES"):
            seconds = result.value["seconds"] if result.value else result.error
            line = f"{time.monotonic() - begin:6.1f} s {seconds} {Path(folder).name} {engine}\n"
            CACHE.mkdir(parents=True, exist_ok=True)
            with (CACHE / "engine_times.log").open("a") as log:
                log.write(line)
        return result

    start.outcome = outcome
    return start
