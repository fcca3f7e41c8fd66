"""Checkpoints as people bring them, by their headers; the engines' suites serve them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import CheckpointError, check_checkpoint
from lfm2_plugin.reference import ReferenceModel
from tests.engine_common.broken import unsaid
from tests.engine_common.brought import PLAIN, REFUSED, SOURCE
from tests.engine_common.checkpoints import checkpoint


def check(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    arch = Lfm2MoeArch.from_config(config)
    check_checkpoint(arch, folder, config.get("quantization_config"))


@pytest.mark.parametrize("name", PLAIN)
def test_accepted(tmp_path: Path, name: str) -> None:
    check(PLAIN[name].make(tmp_path / "model"))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    folder = REFUSED[name].make(tmp_path / "model")
    with pytest.raises(CheckpointError) as caught:
        check(folder)
    assert unsaid(REFUSED[name].refused, str(caught.value)) == []
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", [n for n in PLAIN if "bin" not in n])
def test_the_reference_reads_the_same_tensors(tmp_path: Path, name: str) -> None:
    prompt = [3, 5, 8, 13]
    served = ReferenceModel.from_folder(PLAIN[name].make(tmp_path / "model"))
    assert served.generate(prompt, 4) == ReferenceModel.from_folder(checkpoint(SOURCE)).generate(
        prompt, 4
    )
