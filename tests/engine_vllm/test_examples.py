"""The examples, and what ``lfm2 demo`` serves by itself: ``pytest tests/engine_vllm/test_examples.py``."""

from pathlib import Path

import pytest
import torch

from tests.engine_common import example_runs, serving_checks
from tests.engine_common.example_runs import EXAMPLES, kept_demo, run

pytestmark = pytest.mark.engine

EAGER = (
    "--enforce-eager"  # test_tokens.py compiles, and here it would take longer than all the rest
)


def test_offline():
    example_runs.offline_answers_right("offline_vllm.py", EAGER)


def test_run_batch(tmp_path: Path):
    printed = run(EXAMPLES / "run_batch.sh", "", tmp_path / "out.jsonl", EAGER, cwd=tmp_path)
    for words in ("apple river star", "star moon fox", "queen snow garden"):
        assert f"{words.replace(' ', '-')} -> {words}\n" in printed


@pytest.mark.matrix
def test_compiled():
    """As they are written."""
    example_runs.offline_answers_right("offline_vllm.py")


@pytest.mark.matrix
def test_accuracy_in_bfloat16():
    with kept_demo() as (url, _):
        serving_checks.answers_under_64_concurrent_requests(url, dtype=torch.bfloat16)
