"""Checkpoints as people bring them: served with the reference's tokens, or refused by name before any long work."""

import pytest

from tests.engine_common.brought import FORMATS, NO_CONV, PLAIN, REFUSED, dequantised
from tests.engine_common.checkpoint_checks import (
    COUNT,
    asked_of,
    assert_another_head,
    assert_no_kernels,
    assert_refused,
    assert_served,
    outputs,
    same_first_tokens,
    some,
)
from tests.engine_common.checkpoints import altered
from tests.engine_common.int4_weights import dequantise_int4
from tests.engine_common.quantised import quantised
from tests.engine_vllm.test_bad_input import ENGINE, LONG_WORK

pytestmark = pytest.mark.engine

HALF = {**ENGINE, "dtype": "bfloat16"}
WITHOUT_KERNELS = {
    "w8a8": "W8A8 int8",
    "w4a16-g32": "W4A16 int4 g32",
    "w4a16-g128-experts-g32": "W4A16 int4 g32",
    "fp8-dynamic": "W8A8 fp8",
    "nvfp4": "W4A4 NVFP4",
}
"""llm-compressor's own outputs that quantise experts, for which vLLM has no kernels on a CPU without AMX."""


@pytest.mark.parametrize("name", some(PLAIN, ["stacked experts", "shards and a consolidated file"]))
def test_served(run, tmp_path, name):
    assert_served(run, PLAIN[name].make(tmp_path / "model"), ENGINE)


@pytest.mark.parametrize("name", some(REFUSED, ["MLX", "int8 and no config"]))
def test_refused(run, tmp_path, name):
    folder = REFUSED[name].make(tmp_path / "model")
    assert_refused(run, folder, ENGINE, REFUSED[name].refused, LONG_WORK)


@pytest.mark.parametrize("name", some(FORMATS, []))
def test_formats_without_kernels(run, tmp_path, name):
    assert_no_kernels(run, tmp_path / "model", name, HALF, LONG_WORK)


def test_another_head_under_a_tied_config(run, tmp_path):
    assert_another_head(run, tmp_path / "model", ENGINE)


@pytest.mark.parametrize("way", some(NO_CONV, ["an anchored expression"]))
def test_ways_to_name_what_is_not_quantised(run, tmp_path, way):
    """Weights and activations are int8, so a token may differ from the reference's, but rarely the first.

    With the convolutions' weights taken for int8, which they are not, none is the same.
    """
    asked = asked_of(dequantised(tmp_path / "reference"))
    answers = outputs(run, NO_CONV[way].make(tmp_path / "model"), HALF, asked)
    assert same_first_tokens(answers, asked) >= COUNT * 3 // 4


@pytest.mark.matrix
@pytest.mark.parametrize("recipe", WITHOUT_KERNELS)
def test_llm_compressors_own_outputs(run, recipe):
    words = ("vLLM has no kernel", WITHOUT_KERNELS[recipe])
    assert_refused(run, quantised(recipe), HALF, words, LONG_WORK)


@pytest.mark.matrix
def test_llm_compressors_int4_with_plain_experts(run, tmp_path):
    """Served as the tool wrote it; bfloat16 against the float32 reference of the dequantised weights."""
    folder, plain = quantised("w4a16-g128"), {"quantization_config": None}
    asked = asked_of(altered(folder, tmp_path / "reference", dequantise_int4, plain), "demo", 1024)
    assert same_first_tokens(outputs(run, folder, HALF, asked), asked) >= COUNT - 1
