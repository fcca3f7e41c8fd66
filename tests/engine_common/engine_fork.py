"""Runs engine jobs, each in a fresh child of a process that has the engine imported already.

Importing an engine costs more than starting it on a tiny checkpoint, and an engine leaves process-wide
state behind (process groups, compile caches, environment), so every job gets a forked child: no second
import, no leftovers. The one argument is the package of a suite, whose module ``warm`` imports its engine.
Protocol on stdin/stdout, one JSON object per line:

    {"job": path, "result": path, "log": path, "env": {...}, "timeout": seconds}  ->  {"exit": code}

``job`` holds {"call": "module:function", "args": {...}}; the child writes {"value": ...} or
{"error": "Type: text", "trace": ...} to ``result``. Everything it prints goes to ``log``.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import time
import traceback

TIMED_OUT = 124


def run_child(request: dict) -> None:
    """Body of the forked child; never returns."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for key, value in request["env"].items():
        os.environ[key] = value
    with open(request["job"]) as file:
        job = json.load(file)
    code = 0
    try:
        module, function = job["call"].split(":")
        answer = {"value": getattr(importlib.import_module(module), function)(**job["args"])}
    except BaseException as error:  # SystemExit too: the caller wants to see every end
        trace = traceback.format_exc()
        print(trace, file=sys.stderr)
        answer = {"error": f"{type(error).__name__}: {error}", "trace": trace}
        code = 1
    with open(request["result"], "w") as file:
        json.dump(answer, file)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_child(pid: int, timeout: float) -> int:
    """Exit code of the child; its whole process group is gone when this returns."""
    deadline = time.monotonic() + timeout
    code = None
    while code is None and time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # workers that outlived their engine, or the child itself
    if code is None:
        os.waitpid(pid, 0)
        code = TIMED_OUT
    return code


def main() -> None:
    """Imports the engine once, then serves requests until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that an engine prints may reach the protocol
    if os.environ.get("TRITON_INTERPRET") == "1":
        importlib.import_module("tests.interpreter_mends").mend()
    warm = importlib.import_module(f"{sys.argv[1]}.warm")
    print(json.dumps({"ready": warm.VERSION}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run_child(request)
        print(json.dumps({"exit": wait_child(pid, request["timeout"])}), file=answers, flush=True)


if __name__ == "__main__":
    main()
