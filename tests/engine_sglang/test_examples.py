"""The example and ``lfm2 demo`` with the demo model: ``pytest tests/engine_sglang/test_examples.py``."""

import pytest
import torch

from lfm2_plugin.cli.demo import NAME
from tests.engine_common import example_runs, serving_checks
from tests.engine_sglang.serving import rendered

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def demo():
    with example_runs.kept_demo() as found:
        yield found


def test_the_demo_answers_right_and_names_our_class(demo: tuple[str, str]):
    example_runs.demo_answers_right(demo[1], "sglang_model.model.Lfm2MoeForCausalLM")


def test_accuracy_in_bfloat16(demo: tuple[str, str]):
    serving_checks.answers_under_64_concurrent_requests(
        demo[0], rendered, model=NAME, dtype=torch.bfloat16
    )


def test_openai_client(demo: tuple[str, str]):
    example_runs.openai_client_understands(demo[0])


def test_offline():
    example_runs.offline_answers_right("offline_sglang.py")
