"""Checkpoints as people bring them: served with the reference's tokens, or refused by name before any long work."""

import pytest

from tests.engine_common import broken, brought
from tests.engine_common.brought import FORMATS, NO_CONV, PLAIN, REFUSED, SOURCE, dequantised
from tests.engine_common.checkpoints import altered
from tests.engine_common.int4_weights import dequantise_int4
from tests.engine_common.quantised import quantised
from tests.engine_common.references import assert_same, cases, clear_cases
from tests.engine_vllm.test_bad_input import LONG_WORK
from tests.tiers import matrix

pytestmark = pytest.mark.engine

ENGINE = {"dtype": "float32", "enable_prefix_caching": False}
COUNT = 16
SERVED = ["stacked experts", "shards and a consolidated file"]
NAMED = ["MLX", "int8 and no config"]


def some(kinds: dict, always: list[str]) -> list:
    return [name if name in always else matrix(name) for name in kinds]


@pytest.mark.parametrize("name", some(PLAIN, SERVED))
def test_served(run, tmp_path, name):
    folder = PLAIN[name].make(tmp_path / "model")
    asked = cases(SOURCE, COUNT)
    result = run(folder, ENGINE, [{"prompts": [case.prompt for case in asked]}])
    assert_same(result["steps"][0], asked)


@pytest.mark.parametrize("name", some(REFUSED, NAMED))
def test_refused(run, tmp_path, name):
    folder = REFUSED[name].make(tmp_path / "model")
    text = broken.refused(run, folder, ENGINE, LONG_WORK)
    assert broken.unsaid(REFUSED[name].refused, text) == []


@pytest.mark.parametrize("name", some(FORMATS, []))
def test_formats_without_kernels(run, tmp_path, name):
    folder = FORMATS[name].make(tmp_path / "model")
    text = broken.refused(run, folder, {**ENGINE, "dtype": "bfloat16"}, LONG_WORK)
    assert (
        broken.unsaid(
            (*FORMATS[name].refused, "no kernel|not supported|Unknown quantization method"), text
        )
        == []
    )


def test_another_head_under_a_tied_config(run, tmp_path):
    """As in transformers, which serves the head that is there."""
    folder = brought.with_another_head(tmp_path / "model")
    asked = clear_cases(folder, [case.prompt for case in cases(SOURCE, COUNT)], 512)
    result = run(folder, ENGINE, [{"prompts": [case.prompt for case in asked]}])
    assert_same(result["steps"][0], asked)
    tied = {tuple(case.prompt): case.expected.tokens for case in cases(SOURCE, COUNT)}
    assert all(tied[tuple(c.prompt)] != c.expected.tokens for c in asked if tuple(c.prompt) in tied)


@pytest.mark.parametrize("way", some(NO_CONV, ["an anchored expression"]))
def test_ways_to_name_what_is_not_quantised(run, tmp_path, way):
    """Weights and activations are int8, so a token may differ from the reference's, but rarely the first.

    With the convolutions' weights taken for int8, which they are not, none is the same.
    """
    reference = dequantised(tmp_path / "reference")
    asked = clear_cases(reference, [case.prompt for case in cases(SOURCE, COUNT)], 512)
    folder = NO_CONV[way].make(tmp_path / "model")
    result = run(folder, {**ENGINE, "dtype": "bfloat16"}, [{"prompts": [c.prompt for c in asked]}])
    pairs = zip(result["steps"][0], asked, strict=True)
    same = sum(out["tokens"][0] == case.expected.tokens[0] for out, case in pairs)
    assert same >= COUNT * 3 // 4


WITHOUT_KERNELS = {
    "w8a8": "W8A8 int8",
    "w4a16-g32": "W4A16 int4 g32",
    "w4a16-g128-experts-g32": "W4A16 int4 g32",
    "fp8-dynamic": "W8A8 fp8",
    "nvfp4": "W4A4 NVFP4",
}
"""llm-compressor's own outputs that quantise experts, for which vLLM has no kernels on a CPU without AMX."""


@pytest.mark.matrix
@pytest.mark.parametrize("recipe", WITHOUT_KERNELS)
def test_llm_compressors_own_outputs(run, recipe):
    text = broken.refused(run, quantised(recipe), {**ENGINE, "dtype": "bfloat16"}, LONG_WORK)
    assert broken.unsaid(("vLLM has no kernel", WITHOUT_KERNELS[recipe]), text) == []


@pytest.mark.matrix
def test_llm_compressors_int4_with_plain_experts(run, tmp_path):
    """Served as the tool wrote it; bfloat16 against the float32 reference of the dequantised weights."""
    folder = quantised("w4a16-g128")
    reference = altered(
        folder, tmp_path / "reference", dequantise_int4, {"quantization_config": None}
    )
    asked = clear_cases(reference, [case.prompt for case in cases("demo", COUNT)], 1024)
    engine = {**ENGINE, "dtype": "bfloat16"}
    result = run(folder, engine, [{"prompts": [case.prompt for case in asked]}])
    pairs = zip(result["steps"][0], asked, strict=True)
    same = sum(out["tokens"][0] == case.expected.tokens[0] for out, case in pairs)
    assert same >= COUNT - 1
