"""Adapters made by PEFT answer like the model they were merged into; the base model stays as it was."""

import pytest

from tests.engine_common.adapters import (
    BAD,
    FORMS,
    TARGETS,
    adapted_cases,
    adapter,
    all_adapted_cases,
    bad_adapters,
    form,
    form_cases,
)
from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.references import assert_same, cases, wrong
from tests.tiers import matrix

pytestmark = pytest.mark.engine

LORA = {"dtype": "float32", "enable_lora": True, "max_lora_rank": 8}


@pytest.fixture(scope="module")
def adapted(server):
    """As ``run``, with the steps of ``lora_jobs``."""

    def start(model: str, engine: dict, steps: list[dict], **options) -> dict:
        folder = str(checkpoint(model))
        return server.run(
            "lora_jobs:run_engine", model=folder, engine=engine, steps=steps, **options
        ).get()

    return start


@pytest.mark.parametrize(
    ("model", "targets"),
    [("alpha", ["experts", "all"]), matrix("alpha", TARGETS), matrix("beta", TARGETS)],
    ids=["alpha", "alpha, each", "beta, each"],
)
def test_adapters_equal_the_merged_models(run, model, targets):
    """One engine, every adapter in it; between them the base model. All prompts with the adapter on all modules."""
    base = {"prompts": [c.prompt for c in cases(model)[:40]]}
    steps, expected = [base], {"base": cases(model)[:40]}
    for name in targets:
        folder, merged = adapter(model, *TARGETS[name])
        asked = (all_adapted_cases if name == "all" else adapted_cases)(model, merged)
        steps += [{"prompts": [c.prompt for c in asked], "lora": str(folder)}, base]
        expected |= {name: asked, f"base after {name}": expected["base"]}
    engine = {**LORA, "max_loras": 2, "max_cpu_loras": 8, "enable_prefix_caching": False}
    result = run(model, engine, steps)["steps"]
    different = {
        name: f"{len(lines)} of {len(asked)}"
        for (name, asked), outputs in zip(expected.items(), result, strict=True)
        if (lines := wrong(outputs, asked))
    }
    assert not different
    for name in targets:
        plain = {tuple(c.prompt): c.expected.tokens for c in cases(model)}
        known = [c for c in expected[name] if tuple(c.prompt) in plain]
        changed = [c for c in known if c.expected.tokens != plain[tuple(c.prompt)]]
        assert len(changed) > 20, name  # the adapter matters


@pytest.mark.matrix
def test_tensor_parallel(run):
    folder, merged = adapter("alpha", *TARGETS["all"])
    asked = adapted_cases("alpha", merged)
    step = {"prompts": [c.prompt for c in asked], "lora": str(folder)}
    engine = {**LORA, "tensor_parallel_size": 2, "enable_prefix_caching": True}
    result = run("alpha", engine, [step, step], timeout=400)["steps"]
    assert_same(result[0], asked)
    assert_same(result[1], asked)


def test_other_forms_and_bad_ones(adapted, tmp_path):
    """One engine: what trainers make beside plain adapters is served, what can't be is refused before a step."""
    base = list(cases("alpha")[:8])
    plain = {"prompts": [c.prompt for c in base]}
    steps, expected = [], []
    for name in FORMS:
        asked = form_cases("alpha", name)
        expected.append((name, asked))
        steps.append({"prompts": [c.prompt for c in asked], "lora": str(form("alpha", name)[0])})
    bad = bad_adapters("alpha", tmp_path)
    folders = {name: str(path) for name, path in bad.items()}
    prompt = base[0].prompt
    refusals = [
        {"op": "refused", "prompt": prompt, "folders": folders},
        {"op": "refused_by_workers", "folders": folders},
    ]
    engine = {**LORA, "max_lora_rank": 16, "max_loras": 2, "max_cpu_loras": 8}
    result = adapted("alpha", engine, [*steps, *refusals, plain])["steps"]
    different = {
        name: f"{len(lines)} of {len(asked)}"
        for (name, asked), outputs in zip(expected, result, strict=False)
        if (lines := wrong(outputs, asked))
    }
    assert not different
    assert all(len(asked) > 8 for _, asked in expected)
    for said in result[-3:-1]:
        assert said.keys() == BAD.keys()
        for name, (_, message) in BAD.items():
            assert message in said[name], name
            assert f"LoRA adapter {name!r} ({bad[name]}) can't be served. " in said[name]
    assert_same(result[-1], base)
