"""Adapters made by PEFT answer like the model they were merged into; the base model stays as it was."""

import pytest
import torch

from tests.engine_common.adapters import (
    BAD,
    EXPERTS,
    FORMS,
    adapted_cases,
    adapter,
    all_adapted_cases,
    bad_adapters,
    form,
    form_cases,
)
from tests.engine_common.adapters import TARGETS as PLAIN_TARGETS
from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.hf_reference import teacher_forced
from tests.engine_common.references import NEW_TOKENS, Case, cases, wrong
from tests.tiers import matrix
from tests.tolerances import HALF_PRECISION_ERROR_RATIO

pytestmark = pytest.mark.engine

TARGETS = {
    **PLAIN_TARGETS,
    # SGLang's own code drops k_proj without q_proj, and w3 without w1.
    "some": (["k_proj", "feed_forward.w3"], EXPERTS[1:]),
}


@pytest.fixture(scope="module")
def adapted(server):
    """As ``run``, with the steps of ``lora_jobs``; ``adapted.outcome`` doesn't raise."""

    def outcome(model: str, engine: dict, steps: list[dict], **options):
        engine = {"dtype": "float32", "max_loras_per_batch": 3, **engine}
        folder = str(checkpoint(model))
        return server.run(
            "lora_jobs:run_engine", model=folder, engine=engine, steps=steps, **options
        )

    def start(model: str, engine: dict, steps: list[dict], **options) -> dict:
        return outcome(model, engine, steps, **options).get()

    start.outcome = outcome
    return start


def paths(model: str, *names: str) -> list[str]:
    """``--lora-paths`` of some of the adapters above."""
    return [f"{name}={adapter(model, *TARGETS[name])[0]}" for name in names]


def adapted_by(model: str, name: str) -> list[Case]:
    """The cases of one of the adapters above."""
    return adapted_cases(model, adapter(model, *TARGETS[name])[1])


def by_turns(model: str, *names: str | None) -> tuple[list[Case], list[str | None]]:
    """Cases of several adapters (None: of the base model) in turn, and which each is of."""
    lists = [adapted_by(model, name) if name else list(cases(model)[:80]) for name in names]
    rounds = list(zip(*lists, strict=False))
    return [case for turn in rounds for case in turn], list(names) * len(rounds)


def differences(asked: dict[str, list[Case]], result: list[list[dict]]) -> dict[str, str]:
    return {
        name: f"{len(lines)} of {len(expected)}"
        for (name, expected), outputs in zip(asked.items(), result, strict=True)
        if (lines := wrong(outputs, expected))
    }


@pytest.mark.parametrize(
    ("model", "targets"),
    [("alpha", ["some", "all"]), matrix("alpha", TARGETS), matrix("beta", TARGETS)],
    ids=["alpha", "alpha, each", "beta, each"],
)
def test_adapters_equal_the_merged_models(adapted, model, targets):
    """One engine, every adapter in it, more than it has slots; between them the base model.

    The same prompts come again with each adapter: nothing of another's may be found in the prefix cache.
    """
    asked = {"base": list(cases(model)[:40])}
    steps = [{"prompts": [c.prompt for c in asked["base"]]}]
    for name in targets:
        mine = adapted_by(model, name)
        if name == "all":
            mine = all_adapted_cases(model, adapter(model, *TARGETS[name])[1])
        asked |= {name: mine, f"base after {name}": asked["base"]}
        steps += [{"prompts": [c.prompt for c in mine], "lora": name}, dict(steps[0])]
    result = adapted(model, {"lora_paths": paths(model, *targets)}, steps)
    assert not differences(asked, result["steps"])
    for name in targets:
        plain = {tuple(c.prompt): c.expected.tokens for c in cases(model)}
        known = [c for c in asked[name] if tuple(c.prompt) in plain]
        changed = [c for c in known if c.expected.tokens != plain[tuple(c.prompt)]]
        assert len(changed) > 20, name  # the adapter matters


@pytest.mark.parametrize("model", ["alpha", matrix("beta")])
def test_two_adapters_and_the_base_in_one_batch(adapted, model):
    asked, names = by_turns(model, None, "all", "experts")
    engine = {"lora_paths": paths(model, "all", "experts", "conv")}
    step = {"op": "adapted", "prompts": [c.prompt for c in asked], "adapters": names}
    result = adapted(model, engine, [step])
    assert len(asked) > 150
    assert not differences({"mixed": asked}, result["steps"])
    assert max(len(s["tokens"]) for s in result["scheduled"] if s["mode"] == "DECODE") == 64


@pytest.mark.matrix
def test_chunked_prefill(adapted):
    asked, names = by_turns("alpha", "all", None, "conv")
    engine = {"lora_paths": paths("alpha", "all", "conv"), "chunked_prefill_size": 48}
    step = {"op": "adapted", "prompts": [c.prompt for c in asked], "adapters": names}
    for mixed in (False, True):
        result = adapted("alpha", {**engine, "enable_mixed_chunk": mixed}, [dict(step)])
        assert not differences({"chunked": asked}, result["steps"])
        assert any(s["mode"] == "MIXED" for s in result["scheduled"]) == mixed


@pytest.mark.matrix
@pytest.mark.parametrize("parallel", [{}, {"ep_size": 2}], ids=["experts cut", "experts dealt"])
def test_tensor_parallel(adapted, parallel):
    asked, names = by_turns("alpha", "all", None)
    engine = {"lora_paths": paths("alpha", "all"), "tp_size": 2, **parallel}
    step = {"op": "adapted", "prompts": [c.prompt for c in asked], "adapters": names}
    two = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    result = adapted("alpha", engine, [step], env=two, timeout=400)
    assert not differences({"parallel": asked}, result["steps"])


@pytest.mark.matrix
@pytest.mark.parametrize("model", ["alpha-calm", "demo"])
def test_bfloat16(adapted, model):
    """On forced text: no further from the merged model in float32 than twice transformers' bf16 is."""
    folder, merged = adapter(model, *TARGETS["all"])
    texts = [c.prompt + c.expected.tokens for c in adapted_by(model, "all")]
    exact, theirs = (
        torch.tensor([view.logprobs for view in teacher_forced(merged, texts, NEW_TOKENS, dtype)])
        for dtype in (torch.float32, torch.bfloat16)
    )
    step = {"prompts": texts, "params": {"max_new_tokens": 1, "prompt_logprobs": True}}
    engine = {"dtype": "bfloat16", "lora_paths": [f"all={folder}"]}
    (forced,) = adapted(model, engine, [{**step, "lora": "all"}])["steps"]
    ours = torch.tensor([out["prompt_logprobs"][-NEW_TOKENS:] for out in forced])
    allowed = HALF_PRECISION_ERROR_RATIO * (theirs - exact).abs().mean()
    assert (ours - exact).abs().mean() <= allowed


def test_no_room_was_made(adapted):
    base = list(cases("alpha")[:20])
    folder = str(adapter("alpha", *TARGETS["mlp"])[0])
    steps = [
        {"op": "load", "name": "mlp", "path": folder},
        {"prompts": [c.prompt for c in base]},
    ]
    loaded, outputs = adapted("alpha", {"lora_paths": paths("alpha", "conv")}, steps)["steps"]
    assert not loaded["success"]
    assert "It is on w13, w2, for which no room was made at start" in loaded["error"]
    assert "--lora-target-modules all" in loaded["error"]
    assert not wrong(outputs, base)


def test_weights_updated_under_adapters(adapted):
    """The base model becomes another one; a load into modules that LoRA layers are around."""
    other = adapter("alpha", *TARGETS["all"])[1]
    asked = {"before": list(cases("alpha")[:40]), "after": adapted_by("alpha", "all")}
    prompts = [{"prompts": [c.prompt for c in expected]} for expected in asked.values()]
    steps = [prompts[0], {"op": "update", "path": str(other)}, prompts[1]]
    result = adapted("alpha", {"lora_paths": paths("alpha", "experts", "all")}, steps)["steps"]
    assert not differences(asked, result[::2])


def test_other_forms_and_bad_ones(adapted, tmp_path):
    """Loaded while serving: what trainers make beside plain adapters is served, what can't be changes nothing."""
    base = list(cases("alpha")[:8])
    engine = {"enable_lora": True, "max_lora_rank": 16, "lora_target_modules": ["all"]}
    steps, asked = [], {}
    for name in FORMS:
        asked[name] = form_cases("alpha", name)
        steps.append({"op": "load", "name": name, "path": str(form("alpha", name)[0])})
        steps.append({"prompts": [c.prompt for c in asked[name]], "lora": name})
    for name, path in bad_adapters("alpha", tmp_path).items():
        steps.append({"op": "load", "name": name, "path": str(path)})
    asked["base"] = base
    steps.append({"prompts": [c.prompt for c in base]})
    result = adapted("alpha", engine, steps)["steps"]
    served = 2 * (len(asked) - 1)
    assert result[:served:2] == [{"success": True, "error": ""}] * (len(asked) - 1)
    assert not differences(asked, [*result[1:served:2], result[-1]])
    for (name, (_, message)), answer in zip(BAD.items(), result[served:-1], strict=True):
        assert not answer["success"], name
        assert message in answer["error"], name


def test_refused_before_serving(adapted, tmp_path):
    """One error that names the adapter, what is wrong and what to do."""
    write, message = BAD["unknown module"]
    bad = write(adapter("alpha", ["conv.in_proj"])[0], tmp_path / "bad")
    refused = adapted.outcome("alpha", {"lora_paths": [f"bad={bad}"]}, [])
    assert refused.error is not None
    errors = [line for line in refused.log.splitlines() if line.startswith("RuntimeError")]
    assert len(errors) == 1
    assert "Failed to load LoRA adapter bad: " in errors[0]
    assert message in errors[0]


def test_target_modules_that_are_none(adapted):
    engine = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["o_proj", "w1"]}
    refused = adapted.outcome("alpha", engine, [])
    assert refused.error is not None
    assert (
        "--lora-target-modules names o_proj, which adapters of LFM2-MoE can't be on" in refused.log
    )


def test_other_backends_are_refused(adapted):
    engine = {"lora_paths": paths("alpha", "conv"), "lora_backend": "triton"}
    refused = adapted.outcome("alpha", engine, [])
    assert refused.error is not None
    assert "--lora-backend triton needs an accelerator" in refused.log
