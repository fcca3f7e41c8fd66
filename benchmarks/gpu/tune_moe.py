"""Tune vLLM's expert kernel for the published shapes on the GPU that is there.

    python -m benchmarks.gpu.tune_moe --model 8b                # E=32 N=1792, some minutes
    python -m benchmarks.gpu.tune_moe --model 24b --tp 2        # the shard of two GPUs
    VLLM_TUNED_CONFIG_FOLDER=benchmarks/results/gpu/moe vllm serve ...

vLLM's kernel takes its block sizes from a file for the number of experts, their width and the device, and guesses where
there is none. For each number of tokens this starts from the guess and goes down one axis after another as long as that
gains. The file is written after each number of tokens, and what is in it is not done again: a run that was cut off, or
reached its limit, is taken up where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import config_of
from benchmarks.provenance import provenance

RESULTS = Path(__file__).parents[1] / "results" / "gpu" / "moe"
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
AXES: dict[str, tuple[int, ...]] = {
    "BLOCK_SIZE_M": (16, 32, 64, 128, 256),
    "BLOCK_SIZE_N": (32, 64, 128, 256),
    "BLOCK_SIZE_K": (32, 64, 128, 256),
    "GROUP_SIZE_M": (1, 8, 16, 32, 64),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
}
WORTH = 0.98
"""A step along an axis is taken if its time is less than this share of the best: below it is noise."""
BOUND = 0.02  # relative, of bfloat16 outputs whose sums are taken in another order

Config = dict[str, int]
Measure = Callable[[Config], float]


@dataclass(frozen=True)
class Shape:
    """The experts of a layer on one rank: E of them, of width N, over a hidden size of D, A of them a token."""

    E: int
    N: int
    D: int
    A: int


@dataclass(frozen=True)
class Tuned:
    """What was found for a number of tokens; times in microseconds."""

    tokens: int
    guess_us: float
    best_us: float
    tried: int
    config: Config


def shape_of(model: str, ranks: int) -> Shape:
    """The shape of a published model's experts under tensor parallelism.

    Raises:
        ValueError: no such model, or its experts can't be divided so.
    """
    config = config_of(model)
    width = config["moe_intermediate_size"]
    if width % ranks:
        raise ValueError(f"experts of width {width} can't be divided over {ranks} ranks")
    return Shape(
        config["num_experts"], width // ranks, config["hidden_size"], config["num_experts_per_tok"]
    )


def descend(guess: Config, measure: Measure) -> tuple[Config, float, int]:
    """Go down one axis after another from ``guess`` until a round of all axes gains nothing.

    Args:
        guess: where to begin.
        measure: seconds of a config; infinite where it can't run.

    Returns:
        The best config, its seconds, and how many were measured.
    """
    seen: dict[tuple[int, ...], float] = {}

    def seconds(config: Config) -> float:
        key = tuple(config[axis] for axis in AXES)
        if key not in seen:
            seen[key] = measure(config)
        return seen[key]

    best, least = guess, seconds(guess)
    gained = True
    while gained:
        gained = False
        for axis, values in AXES.items():
            for direction in (1, -1):
                for value in sorted(values, key=lambda v: direction * v):
                    if direction * (value - best[axis]) <= 0:
                        continue
                    other = best | {axis: value}
                    if seconds(other) >= WORTH * least:
                        break
                    best, least, gained = other, seconds(other), True
    return best, least, len(seen)


def on_the_axes(config: Config) -> Config:
    """The engine's own guess, with every axis named; what it leaves to Triton is 4 warps and 3 stages."""
    found = {"num_warps": 4, "num_stages": 3} | config
    return {axis: found[axis] for axis in AXES}


def read(path: Path) -> dict[str, Any]:
    """What is in a file of the engine's so far; empty if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def tune(
    shape: Shape,
    path: Path,
    bench: Callable[[int], tuple[Config, Measure]],
    triton_version: str,
    limit_s: float,
    say: Callable[[str], None] = print,
) -> list[Tuned]:
    """Fill the file for ``shape``, number of tokens by number of tokens, until all is there or time is up.

    Args:
        shape: the experts.
        path: the file; what it holds already is kept.
        bench: for a number of tokens, the engine's guess and a way to measure configs.
        triton_version: written into the file, as vLLM's own have it.
        limit_s: no number of tokens is begun after that many seconds.
        say: told of each result.
    """
    began, found = time.monotonic(), []
    held = {"triton_version": triton_version} | read(path)
    left = [tokens for tokens in TOKENS if str(tokens) not in held]
    for tokens in left:
        if time.monotonic() - began > limit_s:
            say(f"time is up; {len(left) - len(found)} numbers of tokens are left, run it again")
            break
        guess, measure = bench(tokens)
        config, seconds, tried = descend(guess, measure)
        result = Tuned(tokens, measure(guess) * 1e6, seconds * 1e6, tried, config)
        found.append(result)
        held[str(tokens)] = config
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(held, indent=1) + "\n")
        say(f"{tokens} tokens: {result.guess_us:.1f} -> {result.best_us:.1f} us, {tried} tried")
    return found


def table(shape: Shape, found: list[Tuned], device: str) -> str:
    """Guess against tuned, as Markdown."""
    lines = [
        f"{device}, E={shape.E} N={shape.N} D={shape.D}, top {shape.A}; times in microseconds",
        "",
        "| tokens | vLLM's guess | tuned | ratio |",
        "| --: | --: | --: | --: |",
    ]
    for row in found:
        ratio = row.guess_us / row.best_us
        lines.append(f"| {row.tokens} | {row.guess_us:.1f} | {row.best_us:.1f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def vllm_bench(shape: Shape, device: str = "cuda") -> Callable[[int], tuple[Config, Measure]]:
    """Measures vLLM's kernel on random weights and uniform routing; each config's output is compared with the guess's.

    Raises:
        ImportError: vLLM is not installed.
    """
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench_cudagraph
    from vllm.model_executor.layers.fused_moe import override_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts, get_default_config

    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        values = torch.randn(*size, generator=generator, device=device, dtype=torch.float32)
        return (values * size[-1] ** -0.5).to(torch.bfloat16)

    w13, w2 = randn(shape.E, 2 * shape.N, shape.D), randn(shape.E, shape.D, shape.N)

    def bench(tokens: int) -> tuple[Config, Measure]:
        x = randn(tokens, shape.D) * shape.D**0.5
        scores = torch.rand(tokens, shape.E, generator=generator, device=device)
        weights, ids = scores.topk(shape.A, dim=1)
        guess = get_default_config(tokens, shape.E, shape.N, shape.D, shape.A, None)

        def run() -> torch.Tensor:
            return fused_experts(x, w13, w2, weights, ids.int())

        with override_config(guess):
            expected = run().float()

        def measure(config: Config) -> float:
            with override_config(config | {"SPLIT_K": 1}):
                try:
                    error = (run().float() - expected).abs().max() / expected.abs().max()
                except OutOfResources:
                    return float("inf")
                if not error < BOUND:
                    raise RuntimeError(f"{config}: outputs differ by {float(error):.3f}")
                return do_bench_cudagraph(run, rep=10, return_mode="median") / 1e3

        return on_the_axes(guess), measure

    return bench


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="8b", help="whose experts: 8b, 24b, 2.5-8b")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks that share them")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files")
    parser.add_argument("--limit", type=float, default=480, help="seconds")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU that torch sees")
    import triton
    from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name

    shape, device = shape_of(options.model, options.tp), torch.cuda.get_device_name()
    path = options.out / get_config_file_name(shape.E, shape.N, None)
    found = tune(shape, path, vllm_bench(shape), triton.__version__, options.limit)
    print(table(shape, found, device))
    if found:
        facts = provenance() | {"device": device, "shape": asdict(shape)}
        log = path.with_name(f"log-{path.stem}-{facts['time'].replace(':', '')}.json")
        log.write_text(json.dumps(facts | {"rows": [asdict(row) for row in found]}, indent=1))


if __name__ == "__main__":
    main()
