"""How SGLang's memory is divided, as arithmetic; tests/engine_sglang/test_memory.py has SGLang's own do it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.models import config_of
from benchmarks.sglang_memory import Plan, laptop, table
from lfm2_plugin.arch import Lfm2MoeArch
from sglang_model.memory import (
    PREFIX_SLOTS,
    REQUEST_TOKENS,
    cpu_memory_options,
    kv_cache_dtype,
    memory_options,
    slots_per_request,
    state_memory_ratio,
)

BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "memory-sglang.json"


def arch(name: str = "24b") -> Lfm2MoeArch:
    return Lfm2MoeArch.from_config(config_of(name))


def options(**said: Any) -> SimpleNamespace:
    """SGLang's options as they are for our model on a GPU when nothing is said."""
    settled = {
        "disable_radix_cache": False,
        "disable_overlap_schedule": False,
        "mamba_radix_cache_strategy": "extra_buffer",
        "kv_cache_dtype": "auto",
        "max_running_requests": None,
        "mamba_full_memory_ratio": None,
        "max_mamba_cache_size": None,
        "max_total_tokens": None,
        "device": "cuda",
    }
    return SimpleNamespace(**settled | said)


@pytest.mark.parametrize(
    ("said", "slots"),
    [
        ({}, 5),
        ({"disable_overlap_schedule": True}, 4),
        ({"mamba_radix_cache_strategy": "extra_buffer_lazy"}, 4),
        ({"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True}, 3),
        ({"disable_radix_cache": True, "mamba_radix_cache_strategy": "auto"}, 1),
    ],
    ids=["default", "no overlap", "lazy", "no snapshots", "no prefix cache"],
)
def test_slots_of_a_request(said: dict[str, Any], slots: int):
    assert slots_per_request(options(**said)) == slots


@pytest.mark.parametrize("name", ["24b", "8b", "2.5-8b"])
@pytest.mark.parametrize("kv", [BF16, FP8])
def test_the_ratio_lasts_for_states_and_keys_alike(name: str, kv: torch.dtype):
    share = state_memory_ratio(arch(name), 5, BF16, kv)
    memory = 20 * 2**30
    states = memory * share / (1 + share)
    by_slots = states / (5 * arch(name).conv_state_bytes(BF16))
    by_tokens = (memory - states) / (REQUEST_TOKENS * arch(name).kv_bytes_per_token(kv))
    assert by_slots == pytest.approx(by_tokens)


def test_the_ratio_counts_both_dtypes():
    plain = memory_options(options(), arch(), BF16, BF16)["mamba_full_memory_ratio"]
    assert plain == 5 * 245_760 / (1536 * 20_480)
    wide = memory_options(options(), arch(), BF16, F32)
    assert wide["mamba_full_memory_ratio"] == 2 * plain
    eight_bits = memory_options(options(kv_cache_dtype="fp8_e4m3"), arch(), BF16, BF16)
    assert eight_bits["mamba_full_memory_ratio"] == 2 * plain
    # A float32 model has both in float32.
    assert memory_options(options(), arch(), F32, F32)["mamba_full_memory_ratio"] == plain


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("auto", F32), ("bf16", BF16), ("bfloat16", BF16), ("fp8_e5m2", FP8), ("mxfp8", FP8)],
)
def test_dtype_of_keys_and_values(name: str, dtype: torch.dtype):
    assert kv_cache_dtype(name, F32).itemsize == dtype.itemsize


@pytest.mark.parametrize("requests", [1, 64, 1024])
def test_requests_that_are_known_get_their_slots(requests: int):
    chosen = memory_options(options(max_running_requests=requests), arch(), BF16, BF16)
    assert chosen == {"max_mamba_cache_size": 5 * requests + PREFIX_SLOTS}


def test_without_prefix_cache_sglang_counts_them_itself():
    said = options(disable_radix_cache=True, max_running_requests=64)
    assert memory_options(said, arch(), BF16, BF16) == {}


@pytest.mark.parametrize("said", [{"mamba_full_memory_ratio": 0.5}, {"max_mamba_cache_size": 100}])
@pytest.mark.parametrize("requests", [None, 64])
def test_what_the_user_says_stays(said: dict[str, Any], requests: int | None):
    assert memory_options(options(max_running_requests=requests, **said), arch(), BF16, BF16) == {}


@pytest.mark.parametrize(
    ("requests", "context", "tokens"),
    [
        (64, 128_000, 64 * 4096),
        (64, 2048, 64 * 2048),
        (8, 128_000, 128_000),
        (None, 32_768, 32_768),
    ],
    ids=["requests", "short context", "one long request", "requests unknown"],
)
def test_tokens_kept_on_a_cpu(requests: int | None, context: int, tokens: int):
    said = options(device="cpu", max_running_requests=requests)
    assert cpu_memory_options(said, context) == {"max_total_tokens": tokens}


@pytest.mark.parametrize("said", [{"max_total_tokens": 100, "device": "cpu"}, {"device": "cuda"}])
def test_tokens_are_bounded_on_a_cpu_only_and_where_the_user_does_not(said: dict[str, Any]):
    assert cpu_memory_options(options(max_running_requests=64, **said), 128_000) == {}


def test_tables_name_both_sides():
    plan = Plan("m", 2**30, 0.83, 99, 2**20, 5, 1_000_000, 50, 256, 20)
    ours = Plan("m", 2**30, 0.83, 9, 2**20, 5, 2_000_000, 80, 64, 30)
    text = table({"builtin": [plan], "ours": [ours]}, ["row"])
    assert text.splitlines()[2] == (
        "| row | 99 | 9 | 0.10 | 0.01 | 1,000,000 | 2,000,000 | 50 | 80 | 50 | 64 | 20 | 30 | 1.50 |"
    )
    assert "| 99 | 0.10 | 1,000,000 | 50 | 50 | 20 |" in laptop([plan, ours])


def test_the_figures_kept_in_the_repository_make_the_promise():
    plans = json.loads(RESULTS.read_text())["plans"]
    default = {
        plan["side"]: plan
        for plan in plans
        if (plan["model"], plan["device"], plan["options"], plan["drafts"])
        == ("24b", "H100", {}, 0)
    }
    assert default["builtin"]["requests"] == pytest.approx(370, abs=5)
    assert default["ours"]["requests"] >= 680
