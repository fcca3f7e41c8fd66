"""A/B in the real engine: our model against the built-in, same flags, in turn.

    python -m benchmarks.compare --model 8b-cut
    python -m benchmarks.compare --model small --set quick --a builtin --b builtin   # the method's own error
    python -m benchmarks.compare --model 8b-cut --profile --only "decode 8"          # where the time goes

Each side is a process with an engine of its own; both stay alive, and only one works at a time. See README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import report
from benchmarks.driver import Pairs, Side, run_pairs
from benchmarks.engines import ENGINES, Flags
from benchmarks.models import MODELS, model_folder
from benchmarks.provenance import provenance
from benchmarks.sides import SIDES
from benchmarks.workloads import SETS, Workload, select
from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.capacity import weight_bytes

RESULTS = Path(__file__).resolve().parent / "results"
# Share of a core above which a measurement is said to be disturbed.
_BUSY = 0.05
_OVERHEAD_GIB = 2.0
_STATE_SLOTS = 512  # conv states of an SGLang side: five for each of 64 requests, and some for the prefix cache


@dataclass(frozen=True)
class Plan:
    """What the command line asked for, settled."""

    engine: str
    workloads: list[Workload]
    pairs: int
    starts: int
    flags: Flags
    environment: dict[str, str]
    labels: tuple[str, str]
    sides: tuple[str, str]
    pythons: tuple[str, str]
    timeout: float


def engine_argument(text: str) -> tuple[str, Any]:
    """``name=value`` with the value read as JSON where it is JSON, else as text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name.replace("-", "_"), json.loads(value)
    except json.JSONDecodeError:
        return name.replace("-", "_"), value


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n")[0]
    )
    add = made.add_argument
    add("--engine", default="vllm", choices=list(ENGINES))
    add("--model", default="small", help=f"{', '.join(MODELS)}, demo, or a checkpoint's folder")
    add("--set", default="standard", choices=list(SETS), help="which workloads")
    add("--only", nargs="+", default=[], metavar="TEXT", help="those whose names contain TEXT")
    add("--pairs", type=int, default=5, help="timed turns of each side in each start")
    add("--starts", type=int, default=1, help="how often both engines are started anew")
    add("--a", default="builtin", choices=SIDES, help="the side that is divided by")
    add("--b", default="ours", choices=SIDES)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="OpenMP threads a side")
    add("--kv-gib", type=int, default=1, help="memory for the KV cache of each side")
    add(
        "--processes", default="one", choices=["one", "default"], help="the engine's process layout"
    )
    add("--engine-arg", type=engine_argument, action="append", default=[], metavar="NAME=VALUE")
    add("--python-a", default=sys.executable, help="interpreter of side A")
    add("--python-b", default=sys.executable, help="interpreter of side B")
    add("--timeout", type=float, default=1800.0, help="seconds for one engine start or turn")
    add("--name", help="of the result files (default: engine and model)")
    add("--no-files", action="store_true", help="print only")
    add("--profile", action="store_true", help="time by class of operation, instead of A/B")
    return made


def settle(options: argparse.Namespace, folder: Path, random_weights: bool) -> Plan:
    """Derive everything that both sides share from the options.

    Raises:
        ValueError: the workloads do not exist, or fewer than one pair or start was asked for.
    """
    if options.pairs < 1 or options.starts < 1:
        raise ValueError("--pairs and --starts must be at least 1")
    workloads = select(options.set, options.only)
    # Decode sequences grow by every turn's steps.
    longest = max(w.context + w.steps * (options.pairs + 2) + 2 * w.batch for w in workloads)
    arguments = {"max_model_len": -(-longest // 256) * 256 + 256}
    if options.engine == "sglang":
        # Its own arithmetic divides the machine's free memory, of which the other side wants the same.
        arguments |= {
            "max_total_tokens": options.kv_gib * 2**30 // kv_bytes_per_token(folder),
            "max_mamba_cache_size": _STATE_SLOTS,
        }
    arguments |= dict(options.engine_arg)
    if options.profile:
        # Give every fused loop of the compiled graph a name in the profile.
        arguments.setdefault(
            "compilation_config",
            {"inductor_compile_config": {"cpp.enable_kernel_profile": True}},
        )
    environment = {
        "OMP_NUM_THREADS": str(options.threads),
        "VLLM_CPU_KVCACHE_SPACE": str(options.kv_gib),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if options.processes == "one" else "1",
        # The engine's workers are asked which class they run.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    a, b = options.a, options.b
    return Plan(
        engine=options.engine,
        workloads=workloads,
        pairs=options.pairs,
        starts=options.starts,
        flags=Flags(folder, random_weights, options.processes == "one", arguments),
        environment=environment,
        labels=(a, b) if a != b else (f"{a} (A)", f"{b} (B)"),
        sides=(a, b),
        pythons=(options.python_a, options.python_b),
        timeout=options.timeout,
    )


def kv_bytes_per_token(folder: Path) -> int:
    """Bytes of keys and values of one token of the model, in bfloat16."""
    return read_arch(folder).kv_bytes_per_token(torch.bfloat16)


def read_arch(folder: Path) -> Lfm2MoeArch:
    return Lfm2MoeArch.from_config(json.loads((folder / "config.json").read_text()))


def check_memory(folder: Path, kv_gib: float, engines: int) -> None:
    """Refuse to start what would not fit.

    Raises:
        ValueError: the machine has too little free memory for that many engines.
    """
    need = engines * (weight_bytes(read_arch(folder)) / 2**30 + kv_gib + _OVERHEAD_GIB)
    free = psutil.virtual_memory().available / 2**30
    if need > free:
        raise ValueError(
            f"{engines} engines need about {need:.1f} GiB, {free:.1f} GiB are free: "
            "choose a smaller --model or --kv-gib"
        )


def open_sides(plan: Plan, logs: Path, console: Console, b_first: bool = False) -> list[Side]:
    """Start the engines one after the other (starting is the hungriest phase); A and B, whichever came first."""
    sides: list[Side] = []
    try:
        for index in (1, 0) if b_first else (0, 1):
            log = logs / f"{'ab'[index]}-{plan.sides[index]}.log"
            side = Side(
                plan.labels[index],
                plan.sides[index],
                log,
                plan.environment,
                plan.pythons[index],
                plan.timeout,
                plan.engine,
            )
            sides.append(side)
            with console.status(f"starting {side.label} ({plan.engine}; log {log})"):
                seconds = side.start(plan.engine, plan.flags)
            console.print(f"{side.label}: {side.model_class}, started in {seconds:.0f} s")
    except BaseException:
        for side in sides:
            side.stop()
        raise
    return sides[::-1] if b_first else sides


def compare(
    plan: Plan, logs: Path, console: Console, start: int = 0
) -> tuple[list[Pairs], dict[str, str]]:
    """Run every workload on both sides; the samples, and which class served which side.

    The side that starts first changes from start to start: the first has the choice of the memory.
    """
    sides = open_sides(plan, logs, console, b_first=bool(start % 2))
    found: list[Pairs] = []
    try:
        columns = (
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console) as progress:
            for workload in plan.workloads:
                task = progress.add_task(workload.name, total=2 * (plan.pairs + 1))
                pairs = run_pairs(
                    workload,
                    (sides[0], sides[1]),
                    plan.pairs,
                    lambda task=task: progress.advance(task),  # type: ignore[misc]
                )
                found.append(pairs)
                if max(pairs.idle, pairs.others) > _BUSY:
                    console.print(
                        f"[yellow]{workload.name}: disturbed; the waiting side used {pairs.idle:.0%} "
                        f"of a core, other processes {pairs.others:.0%}"
                    )
        return found, {side.label: side.model_class for side in sides}
    finally:
        for side in sides:
            side.stop()


def profile(plan: Plan, logs: Path, console: Console) -> dict[str, dict[str, Any]]:
    """Time by class of operation, one side after the other; by workload, then label."""
    found: dict[str, dict[str, Any]] = {}
    sides = open_sides(plan, logs, console)
    try:
        for workload in plan.workloads:
            for side in sides:
                with console.status(f"{workload.name}: {side.label}"):
                    side.ask("prepare", workload=vars(workload), turns=3)
                    side.ask("turn", number=0)
                    answer = side.ask("profile", number=1)
                    side.ask("finish")
                found.setdefault(workload.name, {})[side.label] = answer
    finally:
        for side in sides:
            side.stop()
    return found


def run(options: argparse.Namespace, console: Console) -> None:
    logs = Path(tempfile.mkdtemp(prefix="lfm2-bench-"))
    folder, real = model_folder(options.model, logs / "models")
    plan = settle(options, folder, not real)
    check_memory(folder, options.kv_gib, 2)
    name = options.name or f"{options.engine}-{options.model.replace('/', '_')}"
    facts = provenance() | {
        "model": options.model,
        "engine_arguments": plan.flags.arguments,
        "environment": plan.environment,
    }
    if options.profile:
        from benchmarks.op_profile import markdown

        profiles = profile(plan, logs, console)
        text = markdown(profiles)
        console.print(text, markup=False, soft_wrap=True)
        if not options.no_files:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}-profile.md").write_text(text + "\n")
            (RESULTS / f"{name}-profile.json").write_text(
                json.dumps(facts | {"profiles": profiles}, indent=1) + "\n"
            )
        return
    starts: list[list[Pairs]] = []
    for start in range(plan.starts):
        found, classes = compare(plan, logs, console, start)
        starts.append(found)
        ratios = (f"{r.workload} {r.ratio:.2f}" for r in map(report.row, found))
        console.print(f"start {start + 1} of {plan.starts}: " + ", ".join(ratios), soft_wrap=True)
        rows = [report.row(*pairs) for pairs in zip(*starts, strict=True)]
        if not options.no_files:  # after each start, so that a run which is cut off is not lost
            write(name, plan, rows, starts, facts | {"classes": classes})
    console.print(report.markdown(rows, plan.labels), markup=False, soft_wrap=True)
    if not options.no_files:
        console.print(f"written: {RESULTS / name}.csv, .json, .png")


def write(
    name: str,
    plan: Plan,
    rows: list[report.Row],
    starts: list[list[Pairs]],
    facts: dict[str, Any],
) -> None:
    """The result files of the starts so far."""
    RESULTS.mkdir(exist_ok=True)
    report.write_csv(RESULTS / f"{name}.csv", rows)
    report.write_json(RESULTS / f"{name}.json", rows, starts, facts)
    version = facts["packages"].get(plan.engine, "")
    title = f"{plan.engine} {version}, {facts['model']}, {facts['cpu']['cpus']} CPUs"
    report.plot(RESULTS / f"{name}.png", rows, plan.labels, title)


def main(argv: list[str] | None = None) -> int:
    console = Console(stderr=False)
    try:
        run(parser().parse_args(argv), console)
    except (ValueError, RuntimeError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
