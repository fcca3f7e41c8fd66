"""Plans of an engine's memory, each side's made in a process of its own, and the tables that they are written in.

An engine settles the model class when it loads its plugins, so one process can plan for one side only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.sides import wrong_class

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
TITLES = {"24b": "LFM2-24B-A2B", "8b": "LFM2-8B-A1B", "2.5-8b": "LFM2.5-8B-A1B"}


def plan_in_process(
    module: str,
    side: str,
    cases: Sequence[Any],
    environment: Mapping[str, str],
    timeout: float,
) -> list[dict[str, Any]]:
    """Plan every case with one side's model class, in a fresh process.

    Args:
        module: what ``python -m`` runs; with ``--worker FILE`` it has to call :func:`work`.
        side: ours or builtin.
        cases: dataclasses.
        environment: of the process.
        timeout: seconds.

    Returns:
        The fields of a plan for each case.

    Raises:
        RuntimeError: the process failed, or the engine resolved the other side's class.

    """
    with tempfile.TemporaryDirectory() as temporary:
        answer = Path(temporary) / "plans.json"
        done = subprocess.run(
            [sys.executable, "-m", module, "--worker", str(answer)],
            input=json.dumps([asdict(case) for case in cases]),
            env=dict(environment),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode:
            raise RuntimeError(
                f"planning {side} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
            )
        plans: list[dict[str, Any]] = json.loads(answer.read_text())
    for plan in plans:
        if problem := wrong_class(side, plan["model_class"]):
            raise RuntimeError(problem)
    return plans


def work(plan: Callable[[dict[str, Any]], Any], answer: Path) -> None:
    """The planning process: cases as JSON on stdin, plans as JSON in a file (stdout is the engine's)."""
    plans = [plan(entry) for entry in json.load(sys.stdin)]
    answer.write_text(json.dumps([asdict(p) for p in plans]))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are figures."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
