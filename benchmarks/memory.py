"""What the conv state costs in vLLM's paged cache, ours against the built-in: the numbers of
docs/memory.md.

    python -m benchmarks.memory            # prints the tables
    python -m benchmarks.memory --write    # also rewrites docs/memory.md and results/memory.json

Needs no GPU and no weights: see :mod:`benchmarks.kv_plan`. Each side is planned in a process of its
own, as the model class is settled when vLLM loads its plugins.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.sides import SIDES, side_environment, wrong_class

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "memory.md"
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """What is planned.

    Attributes:
        model: a name of :mod:`benchmarks.models`.
        cache_mode: ``none`` (no prefix caching) or ``align`` (vLLM's default, prefix caching on).
        drafts: speculative tokens a step, 0 for none.
        kv_dtype: ``auto`` (that of the model) or ``fp8``.
        tokens: length of each request, prompt and answer.
        device_gib: memory of the device.
        utilisation: share of it that the engine may use.
        reserve_gib: assumed need of activations and CUDA graphs.
        block_size: tokens in an attention block.

    """

    model: str
    cache_mode: str = "align"
    drafts: int = 0
    kv_dtype: str = "auto"
    tokens: int = 1536
    device_gib: float = 79.19
    utilisation: float = 0.92
    reserve_gib: float = 3.0
    block_size: int = 16


@dataclass(frozen=True)
class Plan:
    """What vLLM's planner makes of a case; all sizes in bytes.

    Attributes:
        model_class: module and name of the class that the engine resolved.
        weight_bytes: parameters and buffers of the model.
        cache_bytes: memory left for the cache.
        block_size: tokens in an attention block after vLLM's alignment.
        block_bytes: one block id, over all layers of a group.
        num_blocks: block ids in the pool, the null block among them.
        mamba_groups: KV cache groups that hold conv state.
        conv_blocks: block ids that one request claims for conv state, at most.
        conv_bytes: the same in bytes.
        attention_blocks: block ids that one request of ``tokens`` claims for keys and values.
        requests: how many such requests fit.

    """

    model_class: str
    weight_bytes: int
    cache_bytes: int
    block_size: int
    block_bytes: int
    num_blocks: int
    mamba_groups: int
    conv_blocks: int
    conv_bytes: int
    attention_blocks: int
    requests: int


VARIANTS: dict[str, dict[str, Any]] = {
    "no prefix cache": {"cache_mode": "none"},
    "prefix cache (default)": {"cache_mode": "align"},
    "no prefix cache, 3 drafts": {"cache_mode": "none", "drafts": 3},
    "prefix cache, 3 drafts": {"cache_mode": "align", "drafts": 3},
    "no prefix cache, fp8 KV": {"cache_mode": "none", "kv_dtype": "fp8"},
    "prefix cache, fp8 KV": {"cache_mode": "align", "kv_dtype": "fp8"},
}
TITLES = {"24b": "LFM2-24B-A2B", "8b": "LFM2-8B-A1B", "2.5-8b": "LFM2.5-8B-A1B"}


def plan_all(side: str, cases: list[Case], timeout: float = 600.0) -> list[Plan]:
    """Plan every case with one side's model class, in a fresh process.

    Raises:
        RuntimeError: the process failed, or the engine resolved the other side's class.

    """
    with tempfile.TemporaryDirectory() as temporary:
        answer = Path(temporary) / "plans.json"
        command = [sys.executable, "-m", "benchmarks.memory", "--worker", str(answer)]
        done = subprocess.run(
            command,
            input=json.dumps([asdict(case) for case in cases]),
            env=side_environment(side),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode:
            raise RuntimeError(
                f"planning {side} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
            )
        plans = [Plan(**entry) for entry in json.loads(answer.read_text())]
    for plan in plans:
        if problem := wrong_class(side, plan.model_class):
            raise RuntimeError(problem)
    return plans


def _work(answer: Path) -> None:
    """The planning process: cases as JSON on stdin, plans as JSON in a file (stdout is vLLM's)."""
    from benchmarks.kv_plan import plan

    plans = [plan(Case(**entry)) for entry in json.load(sys.stdin)]
    answer.write_text(json.dumps([asdict(p) for p in plans]))


def table(model: str, tokens: int = 1536) -> tuple[str, list[dict[str, Any]]]:
    """One model's Markdown table and the same figures as records."""
    cases = [replace(Case(model, tokens=tokens), **changes) for changes in VARIANTS.values()]
    plans = {side: plan_all(side, cases) for side in SIDES}
    lines = [
        "| | conv bytes a request: built-in | ours | ours / built-in | conv groups: built-in | ours "
        "| block size: built-in | ours | requests that fit: built-in | ours |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    records = []
    for index, (name, case) in enumerate(zip(VARIANTS, cases, strict=True)):
        builtin, ours = plans["builtin"][index], plans["ours"][index]
        lines.append(
            f"| {name} | {builtin.conv_bytes:,} | {ours.conv_bytes:,} "
            f"| {ours.conv_bytes / builtin.conv_bytes:.3f} "
            f"| {builtin.mamba_groups} | {ours.mamba_groups} "
            f"| {builtin.block_size} | {ours.block_size} | {builtin.requests:,} | {ours.requests:,} |"
        )
        records += [asdict(case) | {"side": s, **asdict(plans[s][index])} for s in SIDES]
    first = plans["builtin"][0]
    head = (
        f"### {TITLES.get(model, model)}\n\n"
        f"Weights {first.weight_bytes / GIB:.2f} GiB, left for the cache {first.cache_bytes / GIB:.2f} GiB.\n\n"
    )
    return head + "\n".join(lines) + "\n", records


DOCUMENT_TEXT = """\
# Memory: what the conv state costs

Written by `python -m benchmarks.memory --write`; do not edit by hand.

A short convolution remembers two values a channel: 8 KiB a layer in bfloat16. vLLM keeps them in the same pool of
pages as keys and values, so what a request pays is pages, not bytes. The built-in model gives each conv layer a page
of its own, padded to the size of an attention page (32 KiB at a block of 16 tokens), and these fall into as many
groups as there are conv layers to an attention layer: three for every published model, each with its own block table.
Ours packs the states of those three layers into one page: one group, one block table, a third of the pages.

How the figures are made: each model is built without weights as the engine builds it, its layers are asked for their
cache specs, and vLLM {vllm}'s own planner (`get_kv_cache_configs`) is run on them. Device: H100 of 79.19 GiB, 92 % of
it for the engine (vLLM's default), less the weights, less an assumed 3 GiB for activations and CUDA graphs. Blocks of
16 tokens, bfloat16 (or fp8) keys and values, requests of {tokens:,} tokens. "3 drafts" is n-gram speculation with
three tokens a step. "conv bytes a request" is what the engine admits a request by; with the prefix cache a request
holds less than that most of the time.

No GPU was used. Two things are set by hand: the free memory, and FlashAttention as the backend that page alignment
looks at (vLLM's CPU attention wants blocks of 32 and more). "block size" is what vLLM's alignment makes of the 16: it
grows the attention block when a state page does not fit into an attention page.

{tables}"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(TITLES), metavar="NAME")
    parser.add_argument("--tokens", type=int, default=1536, help="length of a request")
    parser.add_argument("--write", action="store_true", help="rewrite docs/memory.md")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return _work(options.worker)
    texts, records = [], []
    for model in options.models:
        text, rows = table(model, options.tokens)
        print(text)
        texts.append(text)
        records += rows
    if options.write:
        made = provenance()
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(
            DOCUMENT_TEXT.format(
                vllm=made["packages"].get("vllm", "?"),
                tokens=options.tokens,
                tables="\n".join(texts),
            )
        )
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"provenance": made, "plans": records}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
