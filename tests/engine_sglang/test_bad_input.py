"""Bad input through the real engine start: one clear error, before any long work.

"Before long work": before weights are read and the cache is allocated, which the log would show.
"""

import pytest

from tests.engine_common import broken
from tests.engine_common.broken import BROKEN, unsaid, with_three_experts
from tests.engine_common.checkpoints import checkpoint

pytestmark = pytest.mark.engine

ENGINE = {"dtype": "float32"}
LONG_WORK = ("Load weight end", "Mamba Cache is allocated", "KV Cache is allocated")
RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1|0"}


def refused(run, model, engine=None, **options) -> str:
    """What the user reads when the engine doesn't start."""
    return broken.refused(run, model, {**ENGINE, **(engine or {})}, LONG_WORK, **options)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint(run, tmp_path, name):
    make, words = BROKEN[name]
    text = refused(run, make(tmp_path / "model"))
    assert unsaid(words, text) == []


def test_experts_that_can_not_be_divided(run, tmp_path):
    engine = {"tp_size": 2, "ep_size": 2}
    text = refused(run, with_three_experts(tmp_path / "model"), engine, env=RANKS)
    assert "3 experts can't be divided evenly over" in text


def test_heads_that_can_not_be_divided(run):
    text = refused(run, "small", {"tp_size": 3}, env=RANKS)
    assert "4 heads and 128 channels can't be divided over --tp-size 3" in text


def test_attention_over_replicas(run):
    options = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}
    text = refused(run, "small", options, env=RANKS)
    assert "can't be served with --enable-dp-attention" in text


@pytest.mark.parametrize("method", ["fp8", "w8a8_int8", "w8a8_fp8", "gguf"])
def test_unsupported_quantisation(run, method):
    """Methods that SGLang knows and has no kernels for on this CPU; some would start and die when asked."""
    text = refused(run, "small", {"dtype": "bfloat16", "quantization": method})
    assert f"SGLang has no kernels for weights quantised by '{method}'" in text
    assert "Serve the unquantised checkpoint" in text


def test_a_wrong_switch(run):
    text = refused(run, "small", env={"LFM2_PLUGIN": "maybe"})
    assert "LFM2_PLUGIN='maybe' is not understood" in text


def test_a_folder_without_a_checkpoint(run, tmp_path):
    (tmp_path / "config.json").write_bytes((checkpoint("small") / "config.json").read_bytes())
    text = refused(run, tmp_path)
    assert str(tmp_path) in text
