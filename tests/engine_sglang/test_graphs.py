"""Which decodes are captured: the rule by itself. What SGLang makes of it is in ``test_memory.py``."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks.models import config_of
from lfm2_plugin.arch import Lfm2MoeArch
from sglang_model.graphs import (
    GRAPH_BYTES,
    LARGEST_GRAPH,
    MARGIN,
    activation_bytes,
    captures_plain_decodes,
    largest_graph,
)

ARCH = Lfm2MoeArch.from_config(config_of("24b"))
ON_A_GPU = {
    "device": "cuda",
    "cuda_graph_config": SimpleNamespace(decode=SimpleNamespace(backend="full")),
    "disaggregation_mode": "null",
    "speculative_algorithm": None,
    "enable_dp_attention": False,
    "max_running_requests": None,
    "chunked_prefill_size": 8192,
    "max_prefill_tokens": 16384,
}
NO_GRAPHS = SimpleNamespace(decode=SimpleNamespace(backend="disabled"))


def options(**said) -> SimpleNamespace:
    return SimpleNamespace(**ON_A_GPU | said)


@pytest.mark.parametrize(
    "said",
    [
        {"device": "cpu"},
        {"cuda_graph_config": NO_GRAPHS},
        {"disaggregation_mode": "prefill"},
        {"speculative_algorithm": "NGRAM"},
        {"enable_dp_attention": True},
    ],
    ids=str,
)
def test_other_decodes_are_left_to_sglang(said: dict):
    assert captures_plain_decodes(options())
    assert not captures_plain_decodes(options(**said))


def test_what_is_counted_has_to_fit_twice():
    needed = 8192 * activation_bytes(ARCH, 2) + LARGEST_GRAPH * GRAPH_BYTES
    assert largest_graph(options(), ARCH, 2, MARGIN * needed) == LARGEST_GRAPH
    assert largest_graph(options(), ARCH, 2, MARGIN * needed - 1) == 0


@pytest.mark.parametrize(
    ("said", "tokens"),
    [({"chunked_prefill_size": -1}, 16384), ({"chunked_prefill_size": 100}, 100)],
)
def test_prompts_count_as_they_are_cut(said: dict, tokens: int):
    needed = tokens * activation_bytes(ARCH, 2) + LARGEST_GRAPH * GRAPH_BYTES
    assert largest_graph(options(**said), ARCH, 2, MARGIN * needed) == LARGEST_GRAPH
    assert largest_graph(options(**said), ARCH, 2, MARGIN * needed - 1) == 0


@pytest.mark.parametrize(("running", "largest"), [(None, 1024), (7, 7), (4096, 1024)])
def test_no_more_than_run_at_once(running: int | None, largest: int):
    assert largest_graph(options(max_running_requests=running), ARCH, 2, 2**40) == largest


def test_activations_of_a_token():
    """In 16 bits. Of LFM2-24B-A2B a dense layer's are the most: 11,776 wide; without, those of four experts."""
    assert activation_bytes(ARCH, 2) == 2 * (3 * 2048 + 3 * 11776)
    assert activation_bytes(ARCH, 4) == 2 * activation_bytes(ARCH, 2)
    narrow = replace(ARCH, intermediate_size=8)
    assert activation_bytes(narrow, 2) == 2 * (3 * 2048 + 4 * (3 * 1536 + 2048))
    # Some 5 % of the 1.5 MiB that SGLang keeps.
    assert 0.05 < activation_bytes(ARCH, 2) / (1.5 * 2**20) < 0.06
