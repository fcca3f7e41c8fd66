"""Checkpoints as people bring them: served with the reference's tokens, or refused by name before any long work."""

import pytest

from tests.engine_common.brought import FORMATS, PLAIN, REFUSED
from tests.engine_common.checkpoint_checks import (
    assert_another_head,
    assert_no_kernels,
    assert_refused,
    assert_served,
    some,
)
from tests.engine_common.quantised import quantised
from tests.engine_sglang.test_bad_input import ENGINE, LONG_WORK

pytestmark = pytest.mark.engine

# SGLang serves no quantised weights in float32.
QUANTISED = {**ENGINE, "dtype": "bfloat16"}


@pytest.mark.parametrize("name", some(PLAIN, ["three stacks"]))
def test_served(run, tmp_path, name):
    assert_served(run, PLAIN[name].make(tmp_path / "model"), ENGINE)


@pytest.mark.parametrize("name", some(REFUSED, ["no prefix"]))
def test_refused(run, tmp_path, name):
    engine, words = ENGINE, REFUSED[name].refused
    if "quantization_config" in (REFUSED[name].config or {}):
        engine, words = QUANTISED, ("SGLang has no kernels",)  # said before the files are looked at
    assert_refused(run, REFUSED[name].make(tmp_path / "model"), engine, words, LONG_WORK)


@pytest.mark.parametrize("name", some(FORMATS, []))
def test_formats_without_kernels(run, tmp_path, name):
    assert_no_kernels(run, tmp_path / "model", name, QUANTISED, LONG_WORK)


def test_another_head_under_a_tied_config(run, tmp_path):
    assert_another_head(run, tmp_path / "model", ENGINE)


@pytest.mark.matrix
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16-g128", "fp8-dynamic", "nvfp4"])
def test_llm_compressors_own_outputs(run, recipe):
    words = ("SGLang has no kernels", "compressed_tensors|compressed-tensors")
    assert_refused(run, quantised(recipe), QUANTISED, words, LONG_WORK)
