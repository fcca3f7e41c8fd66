"""The example, and what ``lfm2 demo`` serves by itself: ``pytest tests/engine_sglang/test_examples.py``."""

import pytest
import torch

from tests.engine_common import example_runs, serving_checks
from tests.engine_sglang.serving import rendered

pytestmark = pytest.mark.engine


def test_offline():
    example_runs.offline_answers_right("offline_sglang.py")


@pytest.mark.matrix
def test_accuracy_in_bfloat16():
    with example_runs.kept_demo() as (url, _):
        serving_checks.answers_under_64_concurrent_requests(url, rendered, dtype=torch.bfloat16)
