"""What SGLang is told while it resolves its options, before it starts a process: refusals, and our defaults."""

import json

import pytest

from tests.engine_common.checkpoints import altered, checkpoint
from tests.engine_sglang.releases import needs_newest

pytestmark = pytest.mark.engine


@pytest.fixture
def resolved(server):
    """What SGLang's launcher comes to in a child of the process that has SGLang imported."""

    def ask(model=None, **given) -> dict:
        folder = str(model or checkpoint("small"))
        return server.run("options_jobs:resolve", model=folder, given=given).get()

    return ask


def test_a_config_without_architecture_and_dtype(resolved, tmp_path):
    """SGLang's first look at such a config fails, and its dtype would be float16."""
    silent = dict.fromkeys(("architectures", "dtype", "torch_dtype"))
    found = resolved(altered(checkpoint("small"), tmp_path / "model", config=silent))
    assert found == {
        "error": None,
        "dtype": "torch.bfloat16",
        "architectures": ["Lfm2MoeForCausalLM"],
    }


def test_an_unknown_entry_is_refused_until_it_is_null(resolved, tmp_path):
    windowed = altered(checkpoint("small"), tmp_path / "model", config={"sliding_window": 256})
    assert "sliding_window is 256" in resolved(windowed)["error"]
    null = json.dumps({"sliding_window": None})
    assert resolved(windowed, json_model_override_args=null)["error"] is None


def test_a_pipeline_stage_without_a_conv_state_is_refused(server):
    cases = [[2, 1, 37], [2, 2, 36], [40]]
    alone, *others = server.run("options_jobs:stages", partitions=cases).get()
    assert "Pipeline stage 1 would hold layers 2 to 2 and no short convolution" in alone
    assert others == [None, None]


@needs_newest
def test_a_drafter_of_the_family_is_refused(resolved):
    drafter = str(checkpoint("small"))
    found = resolved(
        speculative_algorithm="STANDALONE",
        speculative_draft_model_path=drafter,
        speculative_num_steps=3,
        speculative_eagle_topk=1,
        speculative_num_draft_tokens=4,
    )
    assert f"{drafter} has conv states, and SGLang can't draft" in found["error"]
