"""How SGLang divides a GPU's memory between conv states and keys and values, ours against the built-in: the numbers of
docs/memory-sglang.md.

    python -m benchmarks.sglang_memory            # prints the tables
    python -m benchmarks.sglang_memory --write    # also rewrites docs/memory-sglang.md and results/memory-sglang.json

Needs no GPU and no weights: see :mod:`benchmarks.sglang_plan`. Each side is planned in a process of its own, as the
model class is settled when SGLang loads its plugins.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.planning import GIB, ROOT, TITLES, markdown, plan_in_process, work
from benchmarks.provenance import provenance
from benchmarks.sides import SIDES, side_environment
from benchmarks.stock_sglang import platform_environment
from sglang_model.memory import PREFIX_SLOTS

DOCUMENT = ROOT / "docs" / "memory-sglang.md"
RESULTS = ROOT / "benchmarks" / "results" / "memory-sglang.json"
MIB = 2**20

PLATFORM = "paper_gpu"
_PLATFORM_ENTRY = f"[sglang.srt.platforms]\n{PLATFORM} = benchmarks.sglang_memory:platform\n"
_PLUGIN_ENTRY = "[sglang.srt.plugins]\nlfm2 = lfm2_plugin.register:register_sglang\n"


def platform() -> str:
    """SGLang's entry point for platforms."""
    return "benchmarks.paper_gpu:PaperGpu"


@dataclass(frozen=True)
class Device:
    """Memory in bytes: of the whole device, and what is free before the model is loaded."""

    total: int
    free: int


DEVICES = {
    "H100": Device(81_559 * MIB, int(78.6 * GIB)),
    "H200": Device(143_771 * MIB, int(139.2 * GIB)),
    "24 GiB": Device(24 * GIB, 20 * GIB),
}
"""Totals as nvidia-smi names them. Free is what torch sees less 0.6 GiB of CUDA's own; of a laptop, a guess."""


@dataclass(frozen=True)
class Case:
    """What is planned.

    Attributes:
        model: a name of :mod:`benchmarks.models`.
        device: a name of DEVICES.
        options: SGLang's options (fields of its ServerArgs), what the user says.
        drafts: speculative tokens a step, 0 for none.
        tokens: length of each request, prompt and answer.

    """

    model: str
    device: str = "H100"
    options: dict[str, Any] = field(default_factory=dict)
    drafts: int = 0
    tokens: int = 1536


VARIANTS: dict[str, dict[str, Any]] = {
    "H100, all defaults": {},
    "`--max-running-requests 1024`": {"options": {"max_running_requests": 1024}},
    "`--kv-cache-dtype fp8_e4m3`": {"options": {"kv_cache_dtype": "fp8_e4m3"}},
    "`--disable-radix-cache`": {"options": {"disable_radix_cache": True}},
    "3 drafts, 48 requests": {"drafts": 3, "options": {"max_running_requests": 48}},
    "`--mem-fraction-static 0.93`": {"options": {"mem_fraction_static": 0.93}},
    "H200, all defaults": {"device": "H200"},
}
_CPU = {"disable_cuda_graph": True, "max_running_requests": 64}
LAPTOP = {
    "SGLang's ratio of 0.9": Case("8b-cut", "24 GiB", _CPU | {"mamba_full_memory_ratio": 0.9}),
    "ours": Case("8b-cut", "24 GiB", _CPU),
}
"""What our CPU platform asks for, with SGLang's default ratio and with ours; there is no built-in model on a CPU."""


@dataclass(frozen=True)
class Plan:
    """What SGLang makes of a case.

    Attributes:
        model_class: module and name of the class that the engine resolved.
        weight_bytes: parameters and buffers of the model.
        static_fraction: share of the memory for weights and caches (``mem_fraction_static``).
        slots: state slots.
        slot_bytes: one slot, over all conv layers.
        slots_per_request: slots that SGLang reckons with for a request.
        kv_tokens: tokens whose keys and values fit.
        max_running: requests that SGLang runs at once at most.
        largest_graph: requests of the largest decode that is captured as a CUDA graph (SGLang captures none beyond
            ``max_running``).
        requests: how many requests of ``tokens`` run at once: the least of ``max_running``, what the slots last for,
            and what the keys and values last for.

    """

    model_class: str
    weight_bytes: int
    static_fraction: float
    slots: int
    slot_bytes: int
    slots_per_request: int
    kv_tokens: int
    max_running: int
    largest_graph: int
    requests: int

    @property
    def state_bytes(self) -> int:
        """All slots, and the one that padding is written to."""
        return (self.slots + 1) * self.slot_bytes


def plan_all(side: str, cases: list[Case], timeout: float = 1800.0) -> list[Plan]:
    """Plan every case with one side's model class; raises as :func:`~benchmarks.planning.plan_in_process`."""
    plugins = _PLATFORM_ENTRY + (_PLUGIN_ENTRY if side == "ours" else "")
    environment = side_environment(side) | platform_environment(PLATFORM, plugins)
    entries = plan_in_process("benchmarks.sglang_memory", side, cases, environment, timeout)
    return [Plan(**entry) for entry in entries]


def _work(answer: Path) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()  # before the modules that are imported next, as in SGLang's own processes
    from benchmarks.sglang_plan import plan

    work(lambda entry: plan(Case(**entry)), answer)


COLUMNS = {
    "slots": lambda plan: f"{plan.slots:,}",
    "state GiB": lambda plan: f"{plan.state_bytes / GIB:.2f}",
    "KV tokens": lambda plan: f"{plan.kv_tokens:,}",
    "at once": lambda plan: f"{plan.max_running:,}",
    "graphs": lambda plan: f"{min(plan.largest_graph, plan.max_running):,}",
    "requests": lambda plan: f"{plan.requests:,}",
}


def table(plans: dict[str, list[Plan]], names: list[str]) -> str:
    """One model's Markdown table: for each of ``names`` a plan of either side."""
    rows = []
    for name, *pair in zip(names, *(plans[side] for side in SIDES), strict=True):
        row = [name]
        for write in COLUMNS.values():
            row += [write(plan) for plan in pair]
        builtin, ours = pair
        rows.append([*row, f"{ours.requests / builtin.requests:.2f}"])
    head = [""]
    for column in COLUMNS:
        head += [f"{column}: built-in", "ours"]
    return markdown([*head, "ratio"], rows)


def section(model: str, plans: dict[str, list[Plan]]) -> str:
    """One model's part of the document."""
    first = {side: plans[side][0] for side in SIDES}
    weights = " and ".join(f"{first[side].weight_bytes / GIB:.2f}" for side in SIDES)
    return (
        f"## {TITLES.get(model, model)}\n\n"
        f"Weights {weights} GiB (built-in and ours), a state {first['ours'].slot_bytes / 1024:.0f} KiB.\n\n"
        + table(plans, list(VARIANTS))
    )


def laptop(plans: list[Plan]) -> str:
    """The table of LAPTOP."""
    rows = [
        [name, *(write(plan) for write in COLUMNS.values())]
        for name, plan in zip(LAPTOP, plans, strict=True)
    ]
    return markdown(["", *COLUMNS], rows)


DOCUMENT_TEXT = """\
# Memory in SGLang: conv states beside keys and values

Written by `python -m benchmarks.sglang_memory --write`; do not edit by hand.

SGLang keeps the states of the short convolutions in a pool of slots, apart from keys and values, and divides the memory
between the two when it starts. Its default, 0.9 bytes of state for each byte of keys and values, is made for models
whose states are megabytes. A state of LFM2-24B-A2B costs as much as the keys and values of 12 tokens, so nearly half of
the memory lies idle. Ours divides it, where the user doesn't say how, like this (`sglang_model/memory.py`):

- where it is known how many requests run at once, as many slots as these need, and {prefix} for the prefix cache. It is
  known with `--max-running-requests`, with drafts (SGLang then takes 48), and on our CPU platform (64);
- else so that slots and keys and values last for the same number of requests of {tokens:,} tokens. If most requests are
  much shorter than that, more of them could run: say `--max-running-requests`.

`--mamba-full-memory-ratio` and `--max-mamba-cache-size` are obeyed as ever.

How the figures are made: SGLang {sglang} resolves its options and publishes them as for its scheduler, on a platform of
our own that answers its questions for memory; SGLang's loader builds the model without weights; SGLang's own
`KVCacheConfigurator` sizes the pools. No GPU was used. What it is given:

| | memory of the device | free before the model is loaded |
| --- | --: | --: |
{devices}
The first decides which share of the memory SGLang uses for weights and caches ({fractions}); that share
of the second, less the weights, is what it divides. The weights are those of the model that each side builds: the
built-in copies its embedding for the head. Two more things are said since the platform is no CUDA: that prefill graphs
are on (SGLang's default there, for which it keeps memory), and the number of drafts, as no drafter is loaded (n-gram
speculation).

- *slots*, *state GiB*: the pool of states. *KV tokens*: the pool of keys and values.
- *at once*: how many requests SGLang runs at once at most, whatever their length. It reckons with 3 slots a request
  for the built-in model, 5 for ours (two more for the snapshots that keep the overlap scheduler on), 1 without prefix
  cache.
- *graphs*: decodes of up to so many requests are CUDA graphs. Ours captures more where its activations and SGLang's own
  estimate for graphs fit twice into what SGLang leaves outside the pools (`sglang_model/graphs.py`).
- *requests*: how many of {tokens:,} tokens run at once; *ratio*: ours to the built-in's.

{tables}
## On a CPU

A machine of 24 GiB, 20 of them free, and eight layers of LFM2-8B-A1B. SGLang has no built-in model there; the first
line is ours with SGLang's default division.

{laptop}"""


def document(models: list[str], plans: dict[str, list[list[Plan]]], extra: list[Plan]) -> str:
    """The text of docs/memory-sglang.md.

    Args:
        models: their names.
        plans: for each side and model, a plan for each of VARIANTS.
        extra: a plan for each of LAPTOP.

    """
    devices = "".join(
        f"| {name} | {device.total / GIB:.2f} GiB | {device.free / GIB:.1f} GiB |\n"
        for name, device in DEVICES.items()
    )
    defaults = {
        case.get("device", "H100"): plan.static_fraction
        for case, plan in zip(VARIANTS.values(), plans["ours"][0], strict=True)
        if "options" not in case
    }
    return DOCUMENT_TEXT.format(
        sglang=provenance()["packages"].get("sglang", "?"),
        devices=devices,
        fractions=", ".join(f"{share:.1%} on {device}" for device, share in defaults.items()),
        tokens=Case("").tokens,
        prefix=PREFIX_SLOTS,
        tables="\n".join(
            section(model, {side: plans[side][number] for side in SIDES})
            for number, model in enumerate(models)
        ),
        laptop=laptop(extra),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(TITLES), metavar="NAME")
    parser.add_argument("--write", action="store_true", help="rewrite docs/memory-sglang.md")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return _work(options.worker)
    cases = [Case(model, **variant) for model in options.models for variant in VARIANTS.values()]
    found = {
        "builtin": plan_all("builtin", cases),
        "ours": plan_all("ours", [*cases, *LAPTOP.values()]),
    }
    extra = found["ours"][len(cases) :]
    step = len(VARIANTS)
    plans = {
        side: [found[side][first : first + step] for first in range(0, len(cases), step)]
        for side in SIDES
    }
    text = document(options.models, plans, extra)
    print(text)
    if options.write:
        DOCUMENT.write_text(text)
        records = [
            asdict(case) | {"side": side, **asdict(plan)}
            for side in SIDES
            for case, plan in zip([*cases, *LAPTOP.values()], found[side], strict=False)
        ]
        RESULTS.write_text(
            json.dumps({"provenance": provenance(), "plans": records}, indent=1) + "\n"
        )
    return None


if __name__ == "__main__":
    main()
