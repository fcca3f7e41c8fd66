"""Checkpoints as people bring them: served with the reference's tokens, or refused by name before any long work."""

import pytest

from tests.engine_common import broken, brought
from tests.engine_common.brought import FORMATS, PLAIN, REFUSED, SOURCE
from tests.engine_common.quantised import quantised
from tests.engine_common.references import assert_same, cases, clear_cases
from tests.engine_sglang.test_bad_input import ENGINE, LONG_WORK
from tests.tiers import matrix

pytestmark = pytest.mark.engine

COUNT = 16
SERVED = ["three stacks"]
NAMED = ["no prefix"]


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
    is_quantised = "quantization_config" in (REFUSED[name].config or {})
    # SGLang serves no quantised weights in float32, and says before the files are looked at that it has no kernels.
    engine = {**ENGINE, "dtype": "bfloat16"} if is_quantised else ENGINE
    words = ("SGLang has no kernels",) if is_quantised else REFUSED[name].refused
    text = broken.refused(run, folder, engine, LONG_WORK)
    assert broken.unsaid(words, text) == []


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


@pytest.mark.matrix
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16-g128", "fp8-dynamic", "nvfp4"])
def test_llm_compressors_own_outputs(run, recipe):
    text = broken.refused(run, quantised(recipe), {**ENGINE, "dtype": "bfloat16"}, LONG_WORK)
    assert (
        broken.unsaid(("SGLang has no kernels", "compressed_tensors|compressed-tensors"), text)
        == []
    )
