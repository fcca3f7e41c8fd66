"""The GPU benchmark's other side, an engine's own kernels, in Triton's interpreter against ours.

A process of its own, since Triton's kernels are interpreted or compiled from their import on.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from triton.runtime.interpreter import _implicit_cvt

from benchmarks.gpu import short_conv as benchmark
from benchmarks.gpu import short_conv_builtins
from benchmarks.gpu.short_conv import Case
from benchmarks.gpu.short_conv_builtins import Run, sglang_kernels
from tests.engine_common.engines import search_path
from tests.interpreter_mends import mend, stand_in_for_triton_cpu

CASES = (
    Case("decodes", decodes=3),
    Case("prompts", prompts=(40, 1, 70)),
    Case("decodes beside prompts", 2, (5, 33)),
)


def compared(engine: str) -> str:
    """Runs this file; what it said.

    Raises:
        AssertionError: it failed.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": search_path()}
    command = [sys.executable, "-m", __name__, engine]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def with_handles(compute: Callable[..., SimpleNamespace]) -> Callable[..., SimpleNamespace]:
    """vLLM exchanges arguments of a launch as its grid is computed, when the interpreter has handles of them."""
    kept = []  # the tensors behind the handles

    def computed(starts: torch.Tensor) -> SimpleNamespace:
        programs = compute(starts)
        for entry in programs.nums_dict.values():
            for name in ("batch_ptr", "token_chunk_offset_ptr"):
                kept.append(entry[name])
                entry[name] = _implicit_cvt(entry[name])
        return programs

    return computed


def vllm_kernels_found() -> Callable[..., Run]:
    """vLLM for CPUs has its Triton kernels and hides them: it wants a Triton for CPUs and has others there."""
    stand_in_for_triton_cpu()
    from vllm.platforms import current_platform

    kind = type(current_platform)
    is_cpu, kind.is_cpu = kind.is_cpu, lambda *_: False
    from vllm.model_executor.layers.mamba.ops import causal_conv1d

    kind.is_cpu = is_cpu
    assert causal_conv1d.causal_conv1d_fn.__module__ == causal_conv1d.__name__
    short_conv_builtins.vllm_programs = with_handles(short_conv_builtins.vllm_programs)
    # They multiply in their inputs' dtype, and the interpreter has no bfloat16.
    benchmark.DTYPE, benchmark.BOUND = torch.float32, 1e-6
    return short_conv_builtins.vllm_kernels


def main(engine: str) -> None:
    mend()
    kernels = vllm_kernels_found() if engine == "vllm" else partial(sglang_kernels, fused=True)
    benchmark.D = 64
    for case in CASES:
        bcx, weight, state = benchmark.make_inputs(case, "cpu", engine)
        batch = benchmark.make_batch(case, "cpu")
        before = state.clone()
        benchmark.compare(case, bcx, weight, state, batch, kernels(batch))
        assert torch.equal(state, before), "a comparison moved the states on"
        print("equal:", case.name)


if __name__ == "__main__":
    main(sys.argv[1])
