"""The short convolution on a GPU: our one launch against a built-in model's kernels, and against the device's copy.

    python -m benchmarks.gpu.short_conv --name short-conv-h100     # results/gpu/NAME.json and .md
    python -m benchmarks.gpu.short_conv --only "decode 1024"

Each case is run by both first and compared, then timed: as a replayed CUDA graph ("graph", which hides launches), and
as called ("eager", caches cold). The built-in is that of the engine which is installed, and the states lie as that
engine has them, ours alone as vLLM's. The copy is one of torch's of 512 MiB, bytes read and written.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.gpu.short_conv_builtins import BUILTINS, Run
from benchmarks.provenance import provenance
from lfm2_plugin.conv_batch import ConvBatch
from lfm2_plugin.ops.short_conv import short_conv_naive
from lfm2_plugin.ops.short_conv.triton import short_conv_triton

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
D, K = 2048, 3
DTYPE = torch.bfloat16
COPY_BYTES = 512 * 2**20
BOUND = 0.02  # relative, of bfloat16 outputs whose sums are rounded once here and twice there


@dataclass(frozen=True)
class Case:
    """One step: sequences that decode a token each, and prompts."""

    name: str
    decodes: int = 0
    prompts: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return self.decodes + sum(self.prompts)

    @property
    def sequences(self) -> int:
        return self.decodes + len(self.prompts)

    @property
    def floor_bytes(self) -> int:
        """B, C, x read and y written for each token, a state read and written for each sequence."""
        return (4 * self.tokens + 2 * (K - 1) * self.sequences) * D * DTYPE.itemsize


CASES = [
    *[Case(f"decode {n}", decodes=n) for n in (1, 8, 64, 256, 512, 1024)],
    *[Case(f"prefill {n}", prompts=(n,)) for n in (64, 512, 2048, 8192, 32768)],
    Case("prefill 32 x 256", prompts=(256,) * 32),
    Case("mixed 512 + 4 x 2048", decodes=512, prompts=(2048,) * 4),
]


@dataclass
class Row:
    """What was measured of a case; times in microseconds, ``None`` where no engine is installed.

    Attributes:
        case: its name.
        floor_us: the fewest bytes at the copy's speed.
        ours_graph_us: our launch, of a CUDA graph.
        ours_eager_us: our launch, called.
        builtin_graph_us: the engine's kernels, of a CUDA graph.
        builtin_eager_us: the engine's kernels, called.

    """

    case: str
    floor_us: float
    ours_graph_us: float
    ours_eager_us: float
    builtin_graph_us: float | None
    builtin_eager_us: float | None

    @property
    def of_copy(self) -> float:
        return self.floor_us / self.ours_eager_us

    @property
    def ratio(self) -> float | None:
        return None if self.builtin_graph_us is None else self.builtin_graph_us / self.ours_graph_us


def make_batch(case: Case, device: str) -> ConvBatch:
    """Sequence i in slot i + 1; decodes have a state, prompts begin."""
    lengths = [1] * case.decodes + list(case.prompts)
    has_state = torch.arange(case.sequences, device=device) < case.decodes
    return ConvBatch(
        slots=torch.arange(1, case.sequences + 1, dtype=torch.int32, device=device),
        query_start=torch.tensor([0, *lengths], device=device).cumsum(0).int(),
        has_initial_state=has_state,
        num_decodes=case.decodes,
        num_decode_tokens=case.decodes,
        num_prefills=len(case.prompts),
        num_prefill_tokens=sum(case.prompts),
        null_slot=0,
    )


def make_inputs(
    case: Case, device: str, engine: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random bcx (T, 3D), taps (D, K), tap after tap in memory, and states (slots, D, K - 1): channel after channel, or
    in SGLang column after column.
    """
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(DTYPE)

    states = randn(case.sequences + 1, K - 1, D).transpose(1, 2)
    if engine == "sglang":
        states = states.contiguous()
    return randn(case.tokens, 3 * D), randn(K, D).t(), states


def installed_engine() -> str | None:
    """The engine whose built-in model is the other side."""
    return next((name for name in BUILTINS if importlib.util.find_spec(name)), None)


def measure(case: Case, device: str, engine: str | None, copy_speed: float) -> Row:
    """Compare both sides, then time them.

    Raises:
        AssertionError: a side's outputs or states are not those of the naive twin.
    """
    from triton.testing import do_bench, do_bench_cudagraph

    bcx, weight, state = make_inputs(case, device, engine)
    batch = make_batch(case, device)
    out = torch.empty(case.tokens, D, dtype=DTYPE, device=device)

    def ours() -> None:
        short_conv_triton(bcx, weight, None, state, batch, out)

    builtin = BUILTINS[engine](batch) if engine else None
    theirs_weight = weight.contiguous()

    def theirs() -> None:
        builtin(bcx, theirs_weight, state)

    compare(case, bcx, weight, state, batch, builtin)
    times = []
    for run in (ours, theirs) if builtin else (ours,):
        times += [do_bench_cudagraph(run, return_mode="median") * 1e3]
        times += [do_bench(run, return_mode="median") * 1e3]
    times += [None] * (4 - len(times))
    return Row(case.name, case.floor_bytes / copy_speed * 1e6, *times)


def compare(
    case: Case,
    bcx: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor,
    batch: ConvBatch,
    builtin: Run | None,
) -> None:
    """Ours against the engine's side, without one against the naive twin (not for long prompts, which take it minutes).

    Raises:
        AssertionError: outputs or states differ.
    """
    if case.tokens > 2048 and builtin is None:
        return
    results = []
    for side in ("ours", "builtin" if builtin else "naive"):
        moved = state.clone(memory_format=torch.preserve_format)
        out = torch.empty(case.tokens, D, dtype=DTYPE, device=bcx.device)
        if side == "ours":
            short_conv_triton(bcx, weight, None, moved, batch, out)
        elif side == "builtin":
            out = builtin(bcx, weight.contiguous(), moved)
        else:
            short_conv_naive(bcx, weight, None, moved, batch, out)
        results.append((out.float(), moved))
    (out, moved), (other, other_moved) = results
    error = float((out - other).abs().max() / other.abs().max())
    assert error < BOUND, f"{case.name}: outputs differ by {error:.3f} of the largest"
    assert torch.equal(moved[1:], other_moved[1:]), f"{case.name}: states differ"


def copy_speed(device: str) -> float:
    """Bytes a second of a large copy, read and written."""
    from triton.testing import do_bench

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (do_bench(lambda: target.copy_(source), return_mode="median") / 1e3)


def table(rows: list[Row], speed: float, device: str, engine: str | None) -> str:
    """A Markdown table with the copy's speed above it."""
    other = {"vllm": "vLLM", "sglang": "SGLang"}.get(engine or "", "no engine")
    lines = [
        f"{device}, copy at {speed / 1e12:.2f} TB/s; times in microseconds",
        "",
        "| case | floor | ours, graph | ours, eager "
        f"| {other}, graph | {other}, eager | {other} / ours | of the copy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        times = (row.ours_graph_us, row.ours_eager_us, row.builtin_graph_us, row.builtin_eager_us)
        cells = ["" if t is None else f"{t:.1f}" for t in times]
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(
            f"| {row.case} | {row.floor_us:.1f} | {' | '.join(cells)} | {ratio} | {row.of_copy:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="short-conv", help="of the result files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument(
        "--only", nargs="*", default=[], help="cases whose names contain one of these"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU that torch sees")
    chosen = [c for c in CASES if not options.only or any(t in c.name for t in options.only)]
    device, name, engine = "cuda", torch.cuda.get_device_name(), installed_engine()
    speed = copy_speed(device)
    rows = []
    for case in chosen:
        rows.append(measure(case, device, engine, speed))
        print(table(rows[-1:], speed, name, engine).splitlines()[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    text = table(rows, speed, name, engine)
    print(text)
    (options.out / f"{options.name}.md").write_text(text)
    found = {"device": name, "engine": engine, "copy_bytes_per_second": speed}
    found["rows"] = [asdict(row) for row in rows]
    (options.out / f"{options.name}.json").write_text(json.dumps(provenance() | found, indent=1))


if __name__ == "__main__":
    main()
