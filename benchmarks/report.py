"""From samples to a table, a CSV file, a JSON file and a plot."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.driver import Pairs
from benchmarks.workloads import Sample


@dataclass(frozen=True)
class Row:
    """One workload's figures; rates in tokens a second, ratios are B's over A's (above 1: B is faster).

    The ratio is the median of the ratios pair by pair: what slows the machine for a while slows both turns of a pair.
    Of several starts it is the median of their ratios, and the range is that of the starts: a difference between two
    processes stays for as long as they live, so the pairs of one start say nothing about the next.

    ``cpu_ratio`` is the same of tokens a CPU second, which hardly depends on what else runs; 0 where the engine works
    in other processes.
    """

    workload: str
    kind: str
    batch: int
    context: int
    starts: int
    pairs: int
    a: float
    b: float
    ratio: float
    ratio_min: float
    ratio_max: float
    cpu_ratio: float
    b_faster: int
    idle: float
    others: float


def _cpu_ratio(a: Sample, b: Sample) -> float:
    if not (a.cpu_seconds and b.cpu_seconds):
        return 0.0
    return (b.tokens / b.cpu_seconds) / (a.tokens / a.cpu_seconds)


def row(*starts: Pairs) -> Row:
    """Summarise one workload, of one or several starts."""
    found = [[b.rate / a.rate for a, b in zip(pairs.a, pairs.b, strict=True)] for pairs in starts]
    ratios = found[0] if len(starts) == 1 else [median(ratios) for ratios in found]
    workload = starts[0].workload
    both = [pair for pairs in starts for pair in zip(pairs.a, pairs.b, strict=True)]
    return Row(
        workload=workload.name,
        kind=workload.kind,
        batch=workload.batch,
        context=workload.context,
        starts=len(starts),
        pairs=len(both),
        a=median(a.rate for a, _ in both),
        b=median(b.rate for _, b in both),
        ratio=median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        cpu_ratio=median(_cpu_ratio(a, b) for a, b in both),
        b_faster=sum(ratio > 1 for ratio in ratios),
        idle=mean(pairs.idle for pairs in starts),
        others=mean(pairs.others for pairs in starts),
    )


def _or_dash(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio else "-"


def markdown(rows: Sequence[Row], labels: tuple[str, str]) -> str:
    """The table for a README."""
    a, b = labels
    lines = [f"| tokens/s | {a} | {b} | ratio | range | by CPU time |"]
    lines.append("| --- | --: | --: | --: | --: | --: |")
    lines += [
        f"| {r.workload} | {r.a:,.1f} | {r.b:,.1f} | {r.ratio:.2f} "
        f"| {r.ratio_min:.2f}-{r.ratio_max:.2f} | {_or_dash(r.cpu_ratio)} |"
        for r in rows
    ]
    return "\n".join(lines)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        for r in rows:
            rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(r).items()}
            writer.writerow(rounded)


def write_json(
    path: Path, rows: Sequence[Row], starts: Sequence[Sequence[Pairs]], facts: dict[str, Any]
) -> None:
    """Everything: provenance, the table and every sample of every start."""
    content = facts | {
        "rows": [asdict(r) for r in rows],
        "samples": [
            {
                "start": start,
                "workload": asdict(p.workload),
                "idle": p.idle,
                "others": p.others,
                "a": list(map(asdict, p.a)),
                "b": list(map(asdict, p.b)),
            }
            for start, pairs in enumerate(starts, 1)
            for p in pairs
        ],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def plot(path: Path, rows: Sequence[Row], labels: tuple[str, str], title: str) -> None:
    """One bar a workload: the ratio, with the range over the pairs and the rates written beside
    it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.42 * len(rows)), layout="constrained")
    places = range(len(rows))
    ratios = [r.ratio for r in rows]
    spread = [[r.ratio - r.ratio_min for r in rows], [r.ratio_max - r.ratio for r in rows]]
    colours = ["#2a7f62" if ratio >= 1 else "#b5502f" for ratio in ratios]
    axes.barh(places, ratios, xerr=spread, color=colours, height=0.6, ecolor="#444444", capsize=2)
    axes.axvline(1.0, color="black", linewidth=0.8)
    for place, r in zip(places, rows, strict=True):
        axes.annotate(
            f"{r.b:,.0f} / {r.a:,.0f}",
            (r.ratio_max, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(places, [r.workload for r in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(r.ratio_max for r in rows) * 1.2)
    axes.set_xlabel(f"tokens/s of {labels[1]} over {labels[0]} (written beside: both)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
