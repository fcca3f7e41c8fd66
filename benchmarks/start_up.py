"""How long an engine takes from its command to the first token, ours against the built-in, in turn.

    python -m benchmarks.start_up --engine sglang --model demo --pairs 3

Takes the options of :mod:`benchmarks.compare`; of the workloads the first prompt of the first prefill is answered. Each
start is a process of its own: imports, options, loading, memory, and what the engine compiles or has in its caches.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

from rich.console import Console

from benchmarks.compare import RESULTS, Plan, check_memory, parser, settle
from benchmarks.driver import Side
from benchmarks.models import model_folder
from benchmarks.provenance import provenance
from benchmarks.workloads import Workload

FIRST_TOKEN = Workload("first token", "prefill", 1, 128, 1)


def start_once(plan: Plan, index: int, logs: Path) -> float:
    """Seconds from the start of side ``index``'s process to its first token.

    Raises:
        RuntimeError: it failed, or the class of another side serves.
    """
    began = time.perf_counter()
    log = logs / f"{'ab'[index]}-{plan.sides[index]}.log"
    with Side(
        plan.labels[index],
        plan.sides[index],
        log,
        plan.environment,
        plan.pythons[index],
        plan.timeout,
        plan.engine,
    ) as side:
        side.start(plan.engine, plan.flags)
        side.ask("prepare", workload=asdict(FIRST_TOKEN), turns=1)
        side.ask("turn", number=0)
        return time.perf_counter() - began


def run(options: argparse.Namespace, console: Console) -> None:
    logs = Path(tempfile.mkdtemp(prefix="lfm2-start-"))
    folder, real = model_folder(options.model, logs / "models")
    plan = replace(settle(options, folder, not real), workloads=[FIRST_TOKEN])
    check_memory(folder, options.kv_gib, 1)
    seconds: dict[str, list[float]] = {label: [] for label in plan.labels}
    for index in (0, 1):  # untimed: files into the machine's cache, kernels into the engine's
        start_once(plan, index, logs)
    for pair in range(options.pairs):
        for index in (0, 1) if pair % 2 else (1, 0):
            taken = start_once(plan, index, logs)
            seconds[plan.labels[index]].append(taken)
            console.print(f"{plan.labels[index]}: {taken:.1f} s")
    a, b = (seconds[label] for label in plan.labels)
    ratios = [second / first for first, second in zip(a, b, strict=True)]
    console.print(
        f"{plan.labels[0]} {median(a):.1f} s, {plan.labels[1]} {median(b):.1f} s, ratio {median(ratios):.2f} "
        f"({min(ratios):.2f}-{max(ratios):.2f})"
    )
    if not options.no_files:
        name = options.name or f"start-up-{options.engine}-{options.model.replace('/', '_')}"
        facts = provenance() | {"model": options.model, "engine_arguments": plan.flags.arguments}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(facts | {"seconds": seconds}, indent=1))


def main(argv: list[str] | None = None) -> int:
    try:
        run(parser().parse_args(argv), Console())
    except (ValueError, RuntimeError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
