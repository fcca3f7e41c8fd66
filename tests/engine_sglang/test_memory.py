"""SGLang's own division of a GPU's memory, for the published models, without weights and without the GPU."""

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.sglang_memory import GIB, LAPTOP, VARIANTS, Case, Plan, plan_all
from sglang_model.memory import PREFIX_SLOTS
from tests.engine_sglang.releases import needs_newest

pytestmark = [pytest.mark.engine, needs_newest]

MODELS = ("24b", "8b", "2.5-8b")
SIDES = ("builtin", "ours")
COMPARED = [Case("24b", **variant) for variant in VARIANTS.values()]
COMPARED += [Case(model) for model in MODELS[1:]]
USER = {
    "ratio": {"mamba_full_memory_ratio": 0.5},
    "slots": {"max_mamba_cache_size": 3072},
    "slots for 1024": {"max_mamba_cache_size": 3072, "max_running_requests": 1024},
}
USERS = [Case("24b", options=said) for said in USER.values()]
FLOAT32 = Case("8b", options={"dtype": "float32"})
# With the number of requests known, ours asks for slots by its own count; SGLang divides by its.
STRATEGIES: dict[str, tuple[dict[str, Any], int]] = {
    "default": ({}, 5),
    "no overlap": (
        {"disable_overlap_schedule": True, "mamba_radix_cache_strategy": "extra_buffer"},
        4,
    ),
    "lazy": ({"mamba_radix_cache_strategy": "extra_buffer_lazy"}, 4),
    "no snapshots": ({"disable_overlap_schedule": True}, 3),
}
GRAPHS: dict[str, tuple[Case, int]] = {
    "as many as vLLM's": (Case("24b"), 1024),
    "no more than run": (Case("24b", options={"max_running_requests": 300}), 300),
    "the user's own": (Case("24b", options={"cuda_graph_max_bs_decode": 128}), 128),
    "the user's own sizes": (Case("24b", options={"cuda_graph_bs_decode": [1, 64]}), 64),
    "little memory outside": (Case("24b", options={"mem_fraction_static": 0.95}), 256),
    "a GPU that SGLang captures 48 on": (Case("8b-cut", "24 GiB"), 1024),
    "none": (Case("24b", options={"disable_cuda_graph": True}), 0),
}
"""What is planned, and the requests of the largest decode that is captured."""
REQUESTS = 100
COUNTED = [
    Case("24b", options=said | {"max_running_requests": REQUESTS})
    for said, _ in STRATEGIES.values()
]
CAPTURED = [case for case, _ in GRAPHS.values()]


def key(case: Case) -> str:
    return str(case)


@pytest.fixture(scope="module")
def plans() -> dict[str, dict[str, Plan]]:
    cases = {
        "builtin": [*COMPARED, *USERS, FLOAT32],
        "ours": [*COMPARED, *USERS, FLOAT32, *COUNTED, *CAPTURED, *LAPTOP.values()],
    }
    return {
        side: dict(zip(map(key, cases[side]), plan_all(side, cases[side]), strict=True))
        for side in SIDES
    }


def test_the_built_in_is_what_the_requirement_was_written_against(plans):
    builtin = plans["builtin"][key(Case("24b"))]
    assert builtin.slots == pytest.approx(42_700, rel=0.01)
    assert builtin.state_bytes / GIB == pytest.approx(9.76, rel=0.01)
    assert builtin.kv_tokens == pytest.approx(569_000, rel=0.01)
    assert builtin.requests == pytest.approx(370, abs=4)


def test_ours_at_defaults_runs_680_requests(plans):
    ours = plans["ours"][key(Case("24b"))]
    assert ours.requests >= 680
    assert ours.max_running >= 680
    assert ours.state_bytes < GIB


@pytest.mark.parametrize("model", MODELS)
def test_no_pool_lasts_much_longer_than_the_other(plans, model: str):
    ours = plans["ours"][key(Case(model))]
    by_slots, by_tokens = ours.slots / ours.slots_per_request, ours.kv_tokens / 1536
    assert by_slots == pytest.approx(by_tokens, rel=0.01)
    assert ours.requests > 1.8 * plans["builtin"][key(Case(model))].requests


@pytest.mark.parametrize("case", COMPARED, ids=key)
def test_never_fewer_requests_and_always_more_keys_and_values(plans, case: Case):
    builtin, ours = plans["builtin"][key(case)], plans["ours"][key(case)]
    assert ours.requests >= builtin.requests
    assert ours.kv_tokens > builtin.kv_tokens


def test_the_requests_that_the_user_names_run(plans):
    for case in COMPARED:
        named = case.options.get("max_running_requests")
        if named:
            assert plans["ours"][key(case)].max_running == named


@pytest.mark.parametrize("name", USER)
def test_the_users_own_values_win(plans, name: str):
    case = Case("24b", options=USER[name])
    builtin, ours = plans["builtin"][key(case)], plans["ours"][key(case)]
    if (
        name == "ratio"
    ):  # of what is left beside the weights, of which ours has a quarter of a GiB less
        assert ours.slots == pytest.approx(builtin.slots, rel=0.02)
    else:
        assert ours.slots == builtin.slots == 3072


@pytest.mark.parametrize("name", STRATEGIES)
def test_our_count_of_slots_is_sglangs(plans, name: str):
    said, slots = STRATEGIES[name]
    plan = plans["ours"][key(Case("24b", options=said | {"max_running_requests": REQUESTS}))]
    assert plan.slots_per_request == slots
    assert plan.slots == slots * REQUESTS + PREFIX_SLOTS
    assert plan.max_running == REQUESTS


def test_without_prefix_cache_a_request_has_one_slot(plans):
    case = replace(Case("24b"), options={"disable_radix_cache": True})
    assert plans["ours"][key(case)].slots_per_request == 1
    assert plans["ours"][key(case)].requests > plans["ours"][key(Case("24b"))].requests


def test_states_of_a_float32_model_are_counted_in_float32(plans):
    half = plans["ours"][key(Case("8b"))].slot_bytes
    assert plans["ours"][key(FLOAT32)].slot_bytes == 2 * half
    assert plans["builtin"][key(FLOAT32)].slot_bytes == half  # its fault: it keeps them in bfloat16
    ours = plans["ours"][key(FLOAT32)]
    assert ours.slots / 5 == pytest.approx(ours.kv_tokens / 1536, rel=0.01)


def test_eight_bit_keys_get_more_slots(plans):
    case = Case("24b", options={"kv_cache_dtype": "fp8_e4m3"})
    assert plans["ours"][key(case)].requests > 1.9 * plans["ours"][key(Case("24b"))].requests


@pytest.mark.parametrize("name", GRAPHS)
def test_the_largest_decode_that_is_captured(plans, name: str):
    case, requests = GRAPHS[name]
    assert plans["ours"][key(case)].largest_graph == requests


def test_wider_graphs_leave_the_pools_as_they_are(plans):
    for case in (Case("24b"), Case("8b")):
        builtin, ours = plans["builtin"][key(case)], plans["ours"][key(case)]
        assert builtin.largest_graph == 256 < ours.largest_graph
        assert ours.static_fraction == builtin.static_fraction


def test_on_a_cpu_the_states_take_megabytes(plans):
    sglangs, ours = (plans["ours"][key(case)] for case in LAPTOP.values())
    requests = LAPTOP["ours"].options["max_running_requests"]
    assert ours.max_running == sglangs.max_running == requests
    assert ours.slots == 5 * requests + PREFIX_SLOTS
    assert ours.state_bytes < GIB / 16 < 4 * GIB < sglangs.state_bytes
