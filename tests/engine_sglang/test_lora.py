"""Adapters made by PEFT answer like the model they were merged into; the base model stays as it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lfm2_plugin.arch import Lfm2MoeArch
from tests.engine_common.adapters import (
    ATTENTION,
    CONV,
    EXPERTS,
    MLP,
    adapted_cases,
    adapter,
    all_adapted_cases,
)
from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.hf_reference import teacher_forced
from tests.engine_common.references import NEW_TOKENS, Case, cases, wrong
from tests.tiers import matrix
from tests.tolerances import HALF_PRECISION_ERROR_RATIO

pytestmark = pytest.mark.engine

TARGETS = {
    "attention": (ATTENTION, []),
    "conv": (CONV, []),
    "mlp": (MLP, []),
    "experts": ([], EXPERTS),
    "all": (ATTENTION + CONV + MLP, EXPERTS),
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


def test_loaded_while_serving(adapted):
    """The server starts without an adapter; one that it can't serve changes nothing."""
    asked = {"conv": adapted_by("alpha", "conv"), "experts": adapted_by("alpha", "experts")}
    folders = {name: str(adapter("alpha", *TARGETS[name])[0]) for name in asked}
    engine = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["all"]}
    steps = []
    for name, expected in asked.items():
        steps.append({"op": "load", "name": name, "path": folders[name]})
        steps.append({"prompts": [c.prompt for c in expected], "lora": name})
    result = adapted("alpha", engine, steps)["steps"]
    assert result[0] == result[2] == {"success": True, "error": ""}
    assert not differences(asked, result[1::2])


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


def rewritten(folder: Path, target: Path, change, **settings) -> Path:
    """A copy of an adapter with other tensors and settings."""
    shutil.copytree(folder, target)
    tensors = change(load_file(folder / "adapter_model.safetensors"))
    save_file(tensors, target / "adapter_model.safetensors")
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return target


def test_experts_one_by_one(adapted, tmp_path):
    """The form in which PEFT saved experts' factors while transformers had a module for each expert."""
    arch = Lfm2MoeArch.from_config(json.loads((checkpoint("alpha") / "config.json").read_text()))

    def unstack(tensors: dict) -> dict:
        apart = {}
        for name, tensor in tensors.items():
            stack, _, side = name.removesuffix(".weight").rpartition(".")
            place = stack.removesuffix(".base_layer")
            shards = ("w1", "w3") if stack != place else ("w2",)
            for expert in range(arch.num_experts):
                for number, shard in enumerate(shards):
                    if side == "lora_A":
                        one = tensor.view(arch.num_experts, 8, -1)[expert]
                    else:
                        one = tensor.view(len(tensor), 8, arch.num_experts)[..., expert]
                        one = one.chunk(len(shards))[number]
                    apart[f"{place}.{expert}.{shard}.{side}.weight"] = one.clone()
        return apart

    folder = adapter("alpha", *TARGETS["experts"])[0]
    settings = {"target_modules": ["w1", "w2", "w3"], "target_parameters": None}
    old = rewritten(folder, tmp_path / "old", unstack, **settings)
    asked = adapted_by("alpha", "experts")
    step = {"prompts": [c.prompt for c in asked], "lora": "old"}
    (outputs,) = adapted("alpha", {"lora_paths": [f"old={old}"]}, [step])["steps"]
    assert not wrong(outputs, asked)


REFUSED = {
    "convolution": (
        lambda tensors: {k.replace("in_proj", "conv"): v for k, v in tensors.items()},
        {"target_modules": ["conv.conv"]},
        "is on modules that can't be adapted: model.layers.0.conv.conv, model.layers.1.conv.conv",
    ),
    "router": (
        lambda tensors: {k.replace("conv.in_proj", "feed_forward.gate"): v for k, v in tensors.items()},
        {"target_modules": ["gate"]},
        "is on modules that can't be adapted: model.layers.0.feed_forward.gate",
    ),
    "other model": (
        lambda tensors: {k: v[..., :4].contiguous() for k, v in tensors.items()},
        {},
        "It was trained on another model",
    ),
    "settings": (lambda tensors: tensors, {"rank_pattern": {"in_proj": 16}}, "trained with rank_pattern"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_serving(adapted, tmp_path, name):
    """One error that names the adapter, what is wrong and what to do."""
    change, settings, message = REFUSED[name]
    folder = adapter("alpha", ["conv.in_proj"])[0]
    bad = rewritten(folder, tmp_path / "bad", change, **settings)
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
