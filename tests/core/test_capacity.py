import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.models import config_of
from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.capacity import (
    GIB,
    DoesNotFit,
    Paging,
    capacity,
    longest_request,
    parameter_counts,
    weight_bytes,
)
from lfm2_plugin.checkpoint.names import expected_tensors

# What vLLM's own planner said (tests/engine_vllm/test_memory.py asks it again).
PLANS = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "results" / "memory.json").read_text()
)["plans"]
OURS = [plan for plan in PLANS if plan["side"] == "ours"]


def arch_of(name: str) -> Lfm2MoeArch:
    return Lfm2MoeArch.from_config(config_of(name))


@pytest.mark.parametrize(
    ("name", "weights", "biases"),
    [
        ("8b", 8_339_929_856, 704),  # Liquid's card
        ("2.5-8b", 8_467_856_832 - 704, 704),  # the card counts both
        ("24b", 23_843_659_008, 64 * 38),
    ],
)
def test_published_models_have_their_published_size(name: str, weights: int, biases: int):
    assert parameter_counts(arch_of(name)) == (weights, biases)
    assert weight_bytes(arch_of(name)) == 2 * weights + 4 * biases


def test_counts_equal_the_checkpoint_tables():
    """Every switch that changes the number of weights, against the table of tensor names."""
    base = config_of("small")
    for changes in (
        {},
        {"conv_bias": True},
        {"tie_word_embeddings": False},
        {"use_expert_bias": False},
        {"head_dim": 32},
        {"num_dense_layers": 0},
        {"conv_L_cache": 5},
    ):
        arch = Lfm2MoeArch.from_config(base | changes)
        sizes = [torch.Size(shape).numel() for shape in expected_tensors(arch).values()]
        assert sum(parameter_counts(arch)) == sum(sizes), changes


@pytest.mark.parametrize(
    "plan", OURS, ids=lambda p: f"{p['model']}-{p['cache_mode']}-{p['kv_dtype']}-{p['drafts']}"
)
def test_equals_vllms_planner(plan: dict):
    paging = Paging(
        block_size=16,
        kv_dtype=torch.float8_e4m3fn if plan["kv_dtype"] == "fp8" else torch.bfloat16,
        drafts=plan["drafts"],
        prefix_cache=plan["cache_mode"] == "align",
    )
    found = capacity(
        arch_of(plan["model"]),
        plan["device_gib"] * GIB,
        plan["tokens"],
        paging,
        plan["utilisation"],
        plan["reserve_gib"] * GIB,
        weights=plan["weight_bytes"],
    )
    for name in (
        "cache_bytes",
        "block_size",
        "block_bytes",
        "num_blocks",
        "conv_bytes",
        "requests",
    ):
        assert getattr(found, name) == plan[name], name


def test_weights_are_those_of_the_built_model():
    """The planner counts buffers too: rotary tables and KV scales, under a thousandth."""
    for plan in OURS:
        assert weight_bytes(arch_of(plan["model"])) <= plan["weight_bytes"]
        assert (
            plan["weight_bytes"] - weight_bytes(arch_of(plan["model"]))
            < 2e-3 * plan["weight_bytes"]
        )


@pytest.mark.parametrize("concurrency", [1, 7, 64, 500])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_the_longest_request_is_the_longest(concurrency: int, prefix_cache: bool):
    arch, paging = arch_of("24b"), Paging(prefix_cache=prefix_cache)
    longest = longest_request(arch, 80 * GIB, concurrency, paging)
    assert capacity(arch, 80 * GIB, longest, paging).requests >= concurrency
    if longest < arch.max_position_embeddings:
        assert capacity(arch, 80 * GIB, longest + 1, paging).requests < concurrency


def test_the_longest_request_stops_at_the_models_context():
    arch = replace(arch_of("8b"), max_position_embeddings=1000)
    assert longest_request(arch, 80 * GIB, 1) == 1000


def test_what_does_not_fit_says_what_is_needed():
    with pytest.raises(DoesNotFit, match=r"^47\.4 GiB are needed .* 22\.1 GiB may be used"):
        capacity(arch_of("24b"), 24 * GIB, 1536)
    with pytest.raises(DoesNotFit, match="1000000 requests at once leave no room"):
        longest_request(arch_of("8b"), 80 * GIB, 1_000_000)


def test_nonsense_is_refused():
    arch = arch_of("8b")
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        capacity(arch, 80 * GIB, 0)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        longest_request(arch, 80 * GIB, 0)
    only_conv = replace(arch, layer_types=("conv",) * arch.num_layers)
    with pytest.raises(ValueError, match="without attention layers"):
        capacity(only_conv, 80 * GIB, 100)
