"""The conv state in vLLM's cache: its own planner and scheduler on the published models, no weights, no GPU."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.memory import VARIANTS, Case, Plan
from benchmarks.models import config_of
from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.capacity import GIB, Paging, capacity
from tests.engine_common.engines import BUILTIN
from tests.tiers import matrix

pytestmark = pytest.mark.engine

MODELS = ["24b", matrix("8b"), matrix("2.5-8b")]
SIDES = {"builtin": BUILTIN, "ours": {}}
THIRD = 1 / 3
HALF = 1 / 2
Plans = Callable[[Case], tuple[Plan, Plan]]


def cases_of(model: str) -> list[Case]:
    return [replace(Case(model), **changes) for changes in VARIANTS.values()]


CASES = cases_of("24b")
CASES += [matrix(case, id=str(case)) for model in ("8b", "2.5-8b") for case in cases_of(model)]


@pytest.fixture(scope="module")
def plans(server) -> Plans:
    """The built-in's plan of a case and ours; a model's cases are planned at once when the first is asked for."""

    @cache
    def of_model(model: str, side: str) -> dict[Case, Plan]:
        cases = cases_of(model)
        entries = [asdict(case) for case in cases]
        job = "planning_jobs:plan_all"
        made = server.run(job, env=SIDES[side], side=side, cases=entries).get()
        return dict(zip(cases, (Plan(**plan) for plan in made), strict=True))

    def planned(case: Case) -> tuple[Plan, Plan]:
        builtin, ours = (of_model(case.model, side)[case] for side in SIDES)
        return builtin, ours

    return planned


def pair(plans: Plans, model: str, **changes: Any) -> tuple[Plan, Plan]:
    return plans(replace(Case(model), **changes))


def test_the_built_in_is_what_the_requirement_was_written_against(plans):
    builtin, _ = pair(plans, "24b", cache_mode="none")
    assert builtin.conv_bytes == 983_040
    builtin, _ = pair(plans, "24b")
    assert builtin.conv_bytes == builtin.peak_bytes == 1_966_080


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_conv_group_instead_of_three(plans, case: Case):
    builtin, ours = plans(case)
    assert builtin.mamba_groups == 3
    assert ours.mamba_groups == 1


@pytest.mark.parametrize("model", MODELS)
def test_a_third_of_the_bytes_without_prefix_cache(plans, model: str):
    for drafts in (0, 3):
        builtin, ours = pair(plans, model, cache_mode="none", drafts=drafts)
        assert ours.conv_bytes <= THIRD * builtin.conv_bytes
        assert ours.peak_bytes <= THIRD * builtin.peak_bytes


@pytest.mark.parametrize("model", MODELS)
def test_a_third_of_the_bytes_with_prefix_cache(plans, model: str):
    for drafts in (0, 3):
        builtin, ours = pair(plans, model, drafts=drafts)
        # What a request holds as vLLM's scheduler runs it: through an unchunked prompt, and while it decodes.
        assert ours.peak_bytes <= THIRD * builtin.peak_bytes
        assert (
            ours.decoding_bytes <= 1.001 * THIRD * builtin.decoding_bytes
        )  # other steps in which two states overlap
        # What the planner reckons with: the checkpoint's page comes on top, held in the last step of a chunked prompt.
        assert ours.conv_bytes <= HALF * builtin.conv_bytes


@pytest.mark.parametrize("model", MODELS)
def test_a_chunked_prompt_holds_a_checkpoint_more_for_a_step(plans, model: str):
    builtin, ours = pair(plans, model, step_tokens=256)
    assert ours.peak_bytes <= HALF * builtin.peak_bytes
    assert ours.peak_bytes <= ours.conv_bytes


@pytest.mark.parametrize("model", MODELS)
def test_a_prompt_takes_one_step(plans, model: str):
    builtin, ours = pair(plans, model)
    assert len(builtin.prefill_steps) == 2
    assert ours.prefill_steps == [1000]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_holds_more_than_the_planner_reckons_with(plans, case: Case):
    for plan in plans(case):
        assert plan.peak_bytes <= plan.conv_bytes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_never_fewer_requests(plans, case: Case):
    builtin, ours = plans(case)
    assert ours.requests >= builtin.requests


@pytest.mark.parametrize("case", CASES, ids=str)
def test_capacity_reckons_as_the_planner(plans, case: Case):
    _, plan = plans(case)
    found = capacity(
        Lfm2MoeArch.from_config(config_of(case.model)),
        case.device_gib * GIB,
        case.tokens,
        Paging(
            block_size=case.block_size,
            kv_dtype=torch.float8_e4m3fn if case.kv_dtype == "fp8" else torch.bfloat16,
            drafts=case.drafts,
            prefix_cache=case.cache_mode == "align",
        ),
        case.utilisation,
        case.reserve_gib * GIB,
        weights=plan.weight_bytes,
    )
    assert (found.block_size, found.block_bytes) == (plan.block_size, plan.block_bytes)
    assert (found.num_blocks, found.conv_bytes) == (plan.num_blocks, plan.conv_bytes)
    assert found.requests == plan.requests
