"""The references that come with the repository are what transformers answers here and now."""

from pathlib import Path

import pytest

from tests.engine_common import hf_reference, prompts
from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.references import NEW_TOKENS, vocabulary


@pytest.mark.matrix
@pytest.mark.parametrize("model", ["alpha", "beta"])
def test_computed_anew_they_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model):
    asked = prompts.random_prompts(vocabulary(model))
    kept = hf_reference.greedy(checkpoint(model), asked, NEW_TOKENS)
    monkeypatch.setattr(hf_reference, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(hf_reference, "COMPUTED", tmp_path / "computed")
    anew = hf_reference.greedy(checkpoint(model), asked, NEW_TOKENS)
    assert len(list((tmp_path / "computed").glob("*.json"))) == 1  # so it was computed
    assert [case.tokens for case in anew] == [case.tokens for case in kept]
    for one, other in zip(anew, kept, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.margins == pytest.approx(other.margins, abs=1e-3)
