"""The GPU benchmark's other side, an engine's own kernels, in Triton's interpreter against ours.

A process of its own, since Triton's kernels are interpreted or compiled from their import on.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
from interpreter_mends import mend
from triton.runtime.interpreter import _implicit_cvt

from benchmarks.gpu import short_conv as benchmark
from benchmarks.gpu.short_conv import Case
from benchmarks.gpu.short_conv_builtins import BUILTINS

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
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, engine]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def as_handles(compute: Callable[..., tuple]) -> Callable[..., tuple]:
    """vLLM exchanges arguments of a launch as its grid is computed, when the interpreter has handles of them."""
    kept = []

    def computed(*arguments: object, **options: object) -> tuple:
        nums, *others = compute(*arguments, **options)
        for entry in nums.values():
            for name in ("batch_ptr", "token_chunk_offset_ptr"):
                kept.append(entry[name])
                entry[name] = _implicit_cvt(entry[name])
        return nums, *others

    return computed


def reveal_vllm() -> None:
    """vLLM for CPUs has its Triton kernels and hides them: it wants a Triton for CPUs and has others there."""
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=None)
    from vllm.platforms import current_platform

    kind = type(current_platform)
    is_cpu, kind.is_cpu = kind.is_cpu, lambda *_: False
    import vllm.v1.attention.backends.utils as vllm_utils
    from vllm.model_executor.layers.mamba.ops import causal_conv1d

    kind.is_cpu = is_cpu
    assert causal_conv1d.causal_conv1d_fn.__module__ == causal_conv1d.__name__
    vllm_utils.compute_causal_conv1d_metadata = as_handles(
        vllm_utils.compute_causal_conv1d_metadata
    )
    # They multiply in their inputs' dtype, and the interpreter has no bfloat16.
    benchmark.DTYPE, benchmark.BOUND = torch.float32, 1e-6


def reveal_sglang() -> None:
    """SGLang's fused kernels are for one GPU and 2,048 channels; its others are compiled."""
    from sglang.kernels.ops.mamba import lfm_short_conv

    lfm_short_conv.can_dispatch_fused_lfm_short_conv = lambda *_: True


def main(engine: str) -> None:
    mend()
    {"vllm": reveal_vllm, "sglang": reveal_sglang}[engine]()
    benchmark.D = 64
    for case in CASES:
        bcx, weight, state = benchmark.make_inputs(case, "cpu", engine)
        batch = benchmark.make_batch(case, "cpu")
        before = state.clone()
        benchmark.compare(case, bcx, weight, state, batch, BUILTINS[engine](batch))
        assert torch.equal(state, before), "a comparison moved the states on"
        print("equal:", case.name)


if __name__ == "__main__":
    main(sys.argv[1])
