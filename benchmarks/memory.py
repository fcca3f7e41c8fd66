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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.planning import GIB, ROOT, TITLES, markdown, plan_in_process, work
from benchmarks.provenance import provenance
from benchmarks.sides import SIDES, side_environment

DOCUMENT = ROOT / "docs" / "memory.md"
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"


@dataclass(frozen=True)
class Case:
    """What is planned.

    Attributes:
        model: a name of :mod:`benchmarks.models`.
        cache_mode: ``none`` (no prefix caching) or ``align`` (vLLM's default, prefix caching on).
        drafts: speculative tokens a step, 0 for none.
        kv_dtype: ``auto`` (that of the model) or ``fp8``.
        tokens: length of each request, prompt and answer.
        prompt: tokens of it that are the prompt.
        step_tokens: most tokens in one step, so that longer prompts are prefilled in chunks; 0 for vLLM's default.
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
    prompt: int = 1000
    step_tokens: int = 0
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
        conv_blocks: block ids that the planner reckons with for one request's conv state: the most it can ever hold.
        conv_bytes: the same in bytes.
        peak_bytes: conv state that one request of ``prompt`` and an answer really holds, the most after any step.
        decoding_bytes: the same, the mean over its decode steps.
        prefill_steps: tokens in each step of its prompt.
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
    peak_bytes: int
    decoding_bytes: float
    prefill_steps: list[int]
    attention_blocks: int
    requests: int


VARIANTS: dict[str, dict[str, Any]] = {
    "no prefix cache": {"cache_mode": "none"},
    "prefix cache (default)": {"cache_mode": "align"},
    "prefix cache, prompts in chunks of 256": {"cache_mode": "align", "step_tokens": 256},
    "no prefix cache, 3 drafts": {"cache_mode": "none", "drafts": 3},
    "prefix cache, 3 drafts": {"cache_mode": "align", "drafts": 3},
    "no prefix cache, fp8 KV": {"cache_mode": "none", "kv_dtype": "fp8"},
    "prefix cache, fp8 KV": {"cache_mode": "align", "kv_dtype": "fp8"},
}


def plan_all(side: str, cases: list[Case], timeout: float = 1800.0) -> list[Plan]:
    """Plan every case with one side's model class; raises as :func:`~benchmarks.planning.plan_in_process`."""
    environment = side_environment(side)
    entries = plan_in_process("benchmarks.memory", side, cases, environment, timeout)
    return [Plan(**entry) for entry in entries]


def _work(answer: Path) -> None:
    from benchmarks.kv_plan import plan

    work(lambda entry: plan(Case(**entry)), answer)


def tables(
    model: str, cases: list[Case], plans: dict[str, list[Plan]]
) -> tuple[str, list[dict[str, Any]]]:
    """One model's Markdown tables and the same figures as records; a case and a plan for each of VARIANTS."""
    held, fits, records = [], [], []
    for name, case, builtin, ours in zip(
        VARIANTS, cases, plans["builtin"], plans["ours"], strict=True
    ):
        row = [name]
        for quantity in ("conv_bytes", "peak_bytes", "decoding_bytes"):
            a, b = getattr(builtin, quantity), getattr(ours, quantity)
            row += [f"{a:,.0f}", f"{b:,.0f}", f"{b / a:.2f}"]
        held.append(row)
        fits.append(
            [
                name,
                *(f"{p.mamba_groups}" for p in (builtin, ours)),
                *(f"{p.block_size}" for p in (builtin, ours)),
                *(" + ".join(map(str, p.prefill_steps)) for p in (builtin, ours)),
                *(f"{p.requests:,}" for p in (builtin, ours)),
            ]
        )
        records += [
            asdict(case) | {"side": s, **asdict(p)}
            for s, p in zip(SIDES, (builtin, ours), strict=True)
        ]
    first = plans["builtin"][0]
    text = (
        f"## {TITLES.get(model, model)}\n\n"
        f"Weights {first.weight_bytes / GIB:.2f} GiB, left for the cache {first.cache_bytes / GIB:.2f} GiB.\n\n"
    )
    head = ["conv bytes of a request"]
    for quantity in ("claim", "peak", "decoding"):
        head += [f"{quantity}: built-in", "ours", "ratio"]
    text += markdown(head, held)
    head = [""]
    for quantity in ("conv groups", "block", "prefill steps", "requests"):
        head += [f"{quantity}: built-in", "ours"]
    text += "\n" + markdown(head, fits)
    return text, records


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
three tokens a step.

- *claim*: what the planner reckons with for one request, the most it can ever hold. vLLM reports concurrency by it;
  "requests" (how many fit) counts with it too.
- *peak* and *decoding*: what one request of {prompt:,} prompt tokens really holds when vLLM's own scheduler runs it
  alone: the most after any step, and the mean over its decode steps.
- *prefill steps*: in how many steps that scheduler reads the prompt, and the tokens of each. The built-in needs a step
  more for every prompt, as it has to stop where the state is to be kept; ours writes that state on its way (a prefill
  checkpoint), for which it holds one page more in the last step of a prompt.

No GPU was used. Two things are set by hand: the free memory, and FlashAttention as the backend that page alignment
looks at (vLLM's CPU attention wants blocks of 32 and more). "block" is what vLLM's alignment makes of the 16 tokens: it
grows the attention block when a page of states does not fit into an attention page.

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
    variants = list(VARIANTS.values())
    cases = [replace(Case(m, tokens=options.tokens), **v) for m in options.models for v in variants]
    plans = {side: plan_all(side, cases) for side in SIDES}
    texts, records = [], []
    for index, model in enumerate(options.models):
        part = slice(index * len(variants), (index + 1) * len(variants))
        text, rows = tables(model, cases[part], {side: plans[side][part] for side in SIDES})
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
                prompt=Case("").prompt,
                tables="\n".join(texts),
            )
        )
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"provenance": made, "plans": records}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
