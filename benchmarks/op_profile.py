"""Where a turn's time goes: the torch profiler's self times, summed by class of operation."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

# The first pattern that an operator's name matches is its class. Self time is counted, so that
# linears inside an opaque operator (the built-in's short convolution holds both projections) count
# as linears.
CLASSES: list[tuple[str, str]] = [
    ("experts", r"moe|expert|grouped_gemm"),
    ("router", r"topk|top_k|sigmoid|router|grouped_top"),
    ("short conv", r"short_?conv|conv1d|causal_conv|convolution|conv_depthwise"),
    ("attention", r"attention|attn|reshape_and_cache|kv_cache"),
    ("linear", r"linear|addmm|\bmm\b|matmul|onednn|gemm|mkldnn"),
    ("norm", r"norm"),
    ("rotary", r"rotary|rope"),
    ("sampling", r"argmax|softmax|sampl|multinomial|gather"),
    ("compiled loops", r"cpp_fused|graph_\d|compiled|inductor"),
]
_PATTERNS = [(name, re.compile(pattern, re.IGNORECASE)) for name, pattern in CLASSES]


def op_class(name: str) -> str:
    """The class of an operator by its name, ``other`` where none fits."""
    return next((label for label, pattern in _PATTERNS if pattern.search(name)), "other")


def summarise(times: dict[str, float], wall: float) -> dict[str, Any]:
    """Milliseconds by class, the rest of the wall time, and the ten costliest operators.

    Args:
        times: self time of each operator in milliseconds.
        wall: wall time of the turn in milliseconds.
    """
    classes: dict[str, float] = defaultdict(float)
    for name, milliseconds in times.items():
        classes[op_class(name)] += milliseconds
    classes["outside operators"] = max(0.0, wall - sum(times.values()))
    top = sorted(times.items(), key=lambda item: -item[1])[:10]
    return {"wall_ms": wall, "classes": dict(classes), "operators": dict(top)}


def profile_turn(turn: Callable[[], Any]) -> dict[str, Any]:
    """Run a turn under the profiler.

    The profiler sees only this process: start the engine with one process. Its own cost makes the
    turn longer than in a comparison, most of all where operators are many and small.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        turn()
        wall = (time.perf_counter() - start) * 1e3
    times = {e.key: e.self_cpu_time_total / 1e3 for e in profiler.key_averages()}
    return summarise(times, wall)


def markdown(profiles: dict[str, dict[str, Any]]) -> str:
    """One table a workload: milliseconds by class and side."""
    parts = []
    for workload, by_side in profiles.items():
        labels = list(by_side)
        names = {name for answer in by_side.values() for name in answer["classes"]}
        first = by_side[labels[0]]["classes"]
        order = sorted(names, key=lambda name: -first.get(name, 0.0))
        lines = [
            f"| {workload}: ms | {' | '.join(labels)} |",
            "| --- |" + " --: |" * len(labels),
        ]
        for name in order:
            cells = " | ".join(f"{by_side[s]['classes'].get(name, 0.0):,.1f}" for s in labels)
            lines.append(f"| {name} | {cells} |")
        walls = " | ".join(f"{by_side[s]['wall_ms']:,.1f}" for s in labels)
        lines.append(f"| **wall** | {walls} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
