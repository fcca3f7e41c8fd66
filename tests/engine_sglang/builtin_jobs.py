"""SGLang's built-in model inside the child, with what it takes to run it on a CPU at all.

Its convolution is a Triton kernel, and its scheduler doesn't start without compiled kernels. It gets the
convolution in torch that the benchmark measures it with, and our CPU platform; the model is SGLang's.
"""

from tests.engine_sglang import interface_jobs


def run_engine(model: str, engine: dict, steps: list[dict]) -> dict:
    """As in ``interface_jobs``, on the built-in model; the job's environment has to switch ours off."""
    from benchmarks.stock_sglang import convolve_in_torch

    convolve_in_torch()
    result = interface_jobs.run_engine(model, engine, steps)
    assert set(result["class"]) == {"sglang.srt.models.lfm2_moe.Lfm2MoeForCausalLM"}
    return result
