"""How much of a CPU's memory is taken for keys and values."""

from typing import Any

import pytest

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("said", "tokens"),
    [
        ({}, 8 * 2304),
        ({"context_length": None, "max_running_requests": 2}, 2 * 4096),
        ({"max_total_tokens": 9000}, 9000),
    ],
    ids=["default", "the model's context", "the user's"],
)
def test_keys_and_values_leave_a_cpu_its_memory(run, said: dict[str, Any], tokens: int):
    engine = {"max_total_tokens": None, "max_running_requests": 8, **said}
    assert run("alpha", engine, [])["options"]["max_total_num_tokens"] == tokens


def test_a_share_of_the_memory_that_the_user_names_is_taken(run):
    weights_and_cache = {"max_total_tokens": None, "mem_fraction_static": 0.04}
    taken = run("alpha", weights_and_cache, [])["options"]["max_total_num_tokens"]
    assert taken > 2 * 64 * 2304
