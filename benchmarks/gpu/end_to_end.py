"""vLLM end to end on a GPU, random weights: the built-in and ours, one after the other with the same flags.

    python -m benchmarks.gpu.end_to_end --model 24b --name 24b-h100
    python -m benchmarks.gpu.end_to_end --model 8b --engine-arg kv_cache_dtype=fp8
    python -m benchmarks.gpu.end_to_end --model qwen3-30b-a3b --sides builtin

Two engines do not fit on one GPU, so unlike :mod:`benchmarks.compare` each side has the GPU to itself: it starts,
answers a few requests untimed, then each workload of the set "serving". Results are added to NAME.json after every
side, so that repeated calls, each within some minutes, make the runs whose medians the table shows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.compare import engine_argument
from benchmarks.driver import Side
from benchmarks.engines import Flags
from benchmarks.models import model_folder
from benchmarks.provenance import provenance
from benchmarks.sides import SIDES
from benchmarks.workloads import Sample, Workload, select
from lfm2_plugin.dispatch import ENV

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
ARGUMENTS = {
    "max_model_len": 4096,
    "max_num_seqs": 1024,
    "enable_prefix_caching": False,
    "gpu_memory_utilization": 0.9,
}
"""What both sides get, unless the command line says otherwise."""
ENVIRONMENT = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the engine's workers are asked which class they run
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
WARM_UP = Workload("warm-up", "uniform", 32, 256, 32)


def measure(side: Side, flags: Flags, workloads: list[Workload], turns: int) -> dict[str, Any]:
    """Start a side's engine and run every workload on it.

    Raises:
        RuntimeError: it failed, or the class of another side serves.
    """
    seconds = side.start("vllm", flags)
    found: dict[str, list[float]] = {}
    for workload in [WARM_UP, *workloads]:
        side.ask("prepare", workload=asdict(workload), turns=turns)
        samples = [Sample(**side.ask("turn", number=number)) for number in range(turns)]
        side.ask("finish")
        if workload is not WARM_UP:
            found[workload.name] = [sample.rate for sample in samples]
    return {"class": side.model_class, "start_seconds": seconds, "tokens_per_second": found}


def table(runs: list[dict[str, Any]], device: str) -> str:
    """Medians over all runs of a side, as Markdown."""
    rates: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for name, found in run["tokens_per_second"].items():
            rates.setdefault(name, {}).setdefault(run["side"], []).extend(found)
    lines = [
        f"{device}; tokens a second, in and out together (decode: out)",
        "",
        "| | built-in | ours | ratio | runs |",
        "| --- | --: | --: | --: | --: |",
    ]
    for name, sides in rates.items():
        a, b = (median(sides[side]) if side in sides else None for side in SIDES)
        cells = [f"{x:,.0f}" if x else "" for x in (a, b)]
        ratio = f"{b / a:.2f}" if a and b else ""
        counts = " + ".join(str(len(sides.get(side, []))) for side in SIDES)
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {ratio} | {counts} |")
    return "\n".join(lines) + "\n"


def gpu_name() -> str:
    """What the driver calls the GPU, found without taking any of its memory.

    Raises:
        RuntimeError: there is none.
    """
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise RuntimeError("this needs a GPU that nvidia-smi lists") from None
    return done.stdout.splitlines()[0].strip()


def add_run(path: Path, facts: dict[str, Any], run: dict[str, Any]) -> list[dict[str, Any]]:
    """Append a run to the file; all runs in it.

    Raises:
        ValueError: the file's runs are of another model, device or other arguments.
    """
    held = json.loads(path.read_text()) if path.exists() else facts | {"runs": []}
    for key, value in facts.items():
        if held[key] != value:
            raise ValueError(
                f"{path} holds runs with {key}={held[key]!r}, not {value!r}: give another --name"
            )
    held["runs"].append(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held, indent=1) + "\n")
    return held["runs"]


def run(options: argparse.Namespace, console: Console) -> None:
    device = gpu_name()
    logs = Path(tempfile.mkdtemp(prefix="lfm2-end-"))
    folder, real = model_folder(options.model, logs / "models")
    arguments = ARGUMENTS | dict(options.engine_arg)
    flags = Flags(folder, not real, one_process=False, arguments=arguments)
    workloads = select("serving", options.only)
    path = options.out / f"{options.name or 'end-to-end-' + options.model}.json"
    facts = {
        "model": options.model,
        "device": device,
        "engine_arguments": arguments,
        "ops": os.environ.get(ENV, "auto"),  # which implementation of our operators runs
    }
    for name in options.sides:
        with Side(name, name, logs / f"{name}.log", ENVIRONMENT, timeout=options.timeout) as side:
            found = measure(side, flags, workloads, options.turns)
        runs = add_run(path, facts, provenance() | {"side": name} | found)
        text = table(runs, device)
        console.print(text, markup=False, soft_wrap=True)
        path.with_suffix(".md").write_text(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="24b", help="8b, 24b, qwen3-30b-a3b, gpt-oss-20b, ...")
    add("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="in this order")
    add("--only", nargs="+", default=[], metavar="TEXT", help="workloads whose names contain TEXT")
    add("--turns", type=int, default=1, help="timed turns of each workload")
    add("--engine-arg", type=engine_argument, action="append", default=[], metavar="NAME=VALUE")
    add("--timeout", type=float, default=500.0, help="seconds for one engine start or turn")
    add("--name", help="of the result files (default: end-to-end and the model)")
    add("--out", type=Path, default=RESULTS, help="folder of the result files")
    try:
        run(parser.parse_args(argv), Console())
    except (ValueError, RuntimeError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
