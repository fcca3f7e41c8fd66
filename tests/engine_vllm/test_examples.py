"""The examples and ``lfm2 demo`` with the demo model: ``pytest tests/engine_vllm/test_examples.py``."""

from pathlib import Path

import pytest
import torch

from lfm2_plugin.cli.demo import NAME
from tests.engine_common import example_runs, serving_checks
from tests.engine_common.example_runs import EXAMPLES, kept_demo, run

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def demo():
    with kept_demo() as found:
        yield found


def test_the_demo_answers_right_and_names_our_class(demo: tuple[str, str]):
    example_runs.demo_answers_right(demo[1], "vllm_model.model.Lfm2MoeForCausalLM")


def test_accuracy_in_bfloat16(demo: tuple[str, str]):
    serving_checks.answers_under_64_concurrent_requests(demo[0], model=NAME, dtype=torch.bfloat16)


def test_openai_client(demo: tuple[str, str]):
    example_runs.openai_client_understands(demo[0])


def test_offline():
    example_runs.offline_answers_right("offline_vllm.py")


def test_run_batch(tmp_path: Path):
    printed = run(EXAMPLES / "run_batch.sh", "", tmp_path / "out.jsonl", cwd=tmp_path)
    for words in ("apple river star", "star moon fox", "queen snow garden"):
        assert f"{words.replace(' ', '-')} -> {words}\n" in printed
