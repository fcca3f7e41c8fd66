"""Fixtures of both engine suites: one fork server a session, and a function that runs one engine.

A suite's conftest imports them; ``engine_env`` and ``engine_jobs`` are the suite's own modules.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import engine_env
import interpreted
import pytest
from checkpoints import checkpoint
from engines import CACHE, EngineServer, Outcome


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    yield from started(tmp_path_factory, engine_env.ENV)


@pytest.fixture(scope="session")
def run(server):
    """Starts one engine, runs steps, returns the value: run("alpha", {"dtype": ...}, steps)."""
    return runner(server)


@pytest.fixture(scope="module")
def interpreting_run(tmp_path_factory):
    """As ``run``, of engines whose process has had Triton's interpreter since it imported Triton."""
    for server in started(tmp_path_factory, {**engine_env.ENV, **interpreted.ENV}):
        yield runner(server)


def started(tmp_path_factory, env: dict[str, str]) -> Iterator[EngineServer]:
    suite = Path(engine_env.__file__).parent
    server = EngineServer(tmp_path_factory.mktemp("engines"), suite, env)
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
