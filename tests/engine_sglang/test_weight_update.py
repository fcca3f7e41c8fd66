"""Weights that are replaced while an engine serves: the tokens are those of the new checkpoint, each time."""

from pathlib import Path

import pytest

from tests.engine_common.adapters import TARGETS, adapter
from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.weight_updates import (
    a_part,
    beneath_adapters,
    fifty_updates,
    misnamed,
    stacked,
)
from tests.tiers import matrix

pytestmark = pytest.mark.engine

WAYS = ["from_disk", "from_tensors"]


@pytest.fixture
def update(server):
    """Runs one engine with steps of ``weight_jobs``."""

    def start(model: Path, steps: list[dict], **engine) -> list:
        return server.run(
            "weight_jobs:run_engine",
            model=str(model),
            engine={"dtype": "float32", **engine},
            steps=steps,
            env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
            timeout=600,
        ).get()["steps"]

    return start


@pytest.mark.parametrize(
    ("model", "names", "saves", "options"),
    [
        ("alpha", "per expert", True, {}),
        ("alpha", "stacked", False, {}),
        matrix("beta", "per expert", True, {}),
        matrix("beta", "stacked", True, {"tp_size": 2}),
        matrix("alpha", "stacked", True, {"tp_size": 2, "ep_size": 2}),
        matrix("alpha", "per expert", True, {"disable_radix_cache": True}),
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
    a_part(update, tmp_path / "mixed", model, ["from_tensors"])


@pytest.mark.matrix
def test_updates_beneath_adapters(update):
    folder = adapter("alpha", *TARGETS["all"])[0]
    beneath_adapters(update, "alpha", WAYS, lora_paths=[f"{folder}={folder}"])


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_do_not_fit_end_the_engine(server, tmp_path, way):
    """Better no answers than those of half an update, and SGLang knows no way back: none for tensors,
    and for files one that reads the new checkpoint again."""
    folder, wrong = misnamed(tmp_path / "wrong")
    outcome = server.run(
        "weight_jobs:run_engine",
        model=str(checkpoint("alpha")),
        engine={"dtype": "float32"},
        steps=[{"op": way, "folder": str(folder)}],
    )
    assert outcome.error is not None
    assert f"1 unexpected: {wrong}" in outcome.log
