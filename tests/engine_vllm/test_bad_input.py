"""Bad input through the real engine start: one clear error, before any long work.

"Before long work": before the KV cache is allocated and the model is warmed up, which the log would
show.
"""

import pytest

from tests.engine_common import broken
from tests.engine_common.broken import BROKEN, unsaid, with_three_experts

pytestmark = pytest.mark.engine

ENGINE = {"dtype": "float32", "enable_prefix_caching": False}
LONG_WORK = ("Loading weights took", "Warming up", "KV cache size")


def refused(run, model, engine=None, **options) -> str:
    """What the user reads when the engine doesn't start."""
    return broken.refused(run, model, {**ENGINE, **(engine or {})}, LONG_WORK, **options)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint(run, tmp_path, name):
    make, words = BROKEN[name]
    text = refused(run, make(tmp_path / "model"))
    assert unsaid(words, text) == []


def test_experts_that_can_not_be_divided(run, tmp_path):
    engine = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    text = refused(run, with_three_experts(tmp_path / "model"), engine)
    assert "3 experts can't be divided evenly over 2 expert-parallel ranks" in text


def test_heads_that_can_not_be_divided(run):
    text = refused(run, "small", {"tensor_parallel_size": 3})
    assert "--tensor-parallel-size 3" in text or "tensor parallel size (3)" in text


@pytest.mark.parametrize("method", ["fp8", "experts_int8"])
def test_unsupported_quantisation(run, method):
    """Quantisation while loading, for which vLLM has no kernels on a CPU, whether with AMX or without."""
    text = refused(run, "small", {"dtype": "bfloat16", "quantization": method})
    assert "vLLM has no kernel for experts quantised by" in text
    assert "Serve the unquantised checkpoint" in text


def test_speculation_with_prefix_caching_on_a_cpu(run):
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    engine = {"enable_prefix_caching": True, "speculative_config": drafts}
    assert "--no-enable-prefix-caching" in refused(run, "small", engine)


def test_a_wrong_switch(run):
    text = refused(run, "small", env={"LFM2_PLUGIN": "maybe"})
    assert "LFM2_PLUGIN='maybe' is not understood" in text
