"""Weights that are replaced while an engine serves: the tokens are those of the new checkpoint, each time."""

from pathlib import Path

import pytest

from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.references import assert_same, cases
from tests.engine_common.weight_updates import (
    COUNT,
    a_part,
    ask,
    beneath_adapters,
    fifty_updates,
    misnamed,
    stacked,
)
from tests.tiers import matrix

pytestmark = pytest.mark.engine

WAYS = ["from_disk", "from_tensors", "reload_tensors"]


@pytest.fixture
def update(server):
    """Runs one engine with steps of ``weight_jobs``."""

    def start(model: Path, steps: list[dict], **engine) -> list:
        return server.run(
            "weight_jobs:run_engine",
            model=str(model),
            engine={"dtype": "float32", **engine},
            steps=steps,
            timeout=600,
        ).get()["steps"]

    return start


@pytest.mark.parametrize(
    ("model", "names", "saves", "options"),
    [
        ("alpha", "per expert", True, {}),
        ("alpha", "stacked", False, {}),
        matrix("alpha", "per expert", True, {"enforce_eager": False}),
        matrix("beta", "per expert", True, {}),
        matrix("beta", "stacked", True, {"tensor_parallel_size": 2}),
        matrix(
            "alpha", "stacked", True, {"tensor_parallel_size": 2, "enable_expert_parallel": True}
        ),
    ],
)
def test_fifty_updates_and_a_saved_state(update, tmp_path, model, names, saves, options):
    folders = checkpoint(model), checkpoint(f"{model}_other")
    if names == "stacked":
        folders = tuple(stacked(folder, tmp_path / folder.name) for folder in folders)
    saved = tmp_path / "saved" if saves else None
    fifty_updates(update, folders, model, WAYS, saved, **options)


@pytest.mark.parametrize("model", ["alpha", matrix("beta")])
def test_a_part_of_the_weights(update, tmp_path, model):
    a_part(update, tmp_path / "mixed", model, WAYS[1:])


def test_half_an_update_is_not_served(update, tmp_path):
    """It is refused until all weights of a checkpoint have come."""
    folder, wrong = misnamed(tmp_path / "wrong")
    other = checkpoint("alpha_other")
    bad = {"op": "from_tensors", "folder": str(folder)}
    steps = [
        bad,
        {"op": "from_tensors", "folder": str(other), "names": ["model.embed_tokens.weight"]},
        {"op": "from_disk", "folder": str(other)},
        ask("alpha_other"),
        bad,
        {"op": "refusal", **ask("alpha")},
    ]
    failed, part, whole, answers, _, refusal = update(checkpoint("alpha"), steps)
    assert not failed["success"]
    assert f"1 unexpected: {wrong}" in failed["message"]
    assert not part["success"]
    assert "missing" in part["message"]
    assert whole["success"]
    assert_same(answers, cases("alpha_other", COUNT))
    assert "weights of two checkpoints" in refusal


def test_updates_beneath_adapters(update):
    beneath_adapters(update, "alpha", WAYS, enable_lora=True, max_lora_rank=8)
