"""Greedy tokens equal to transformers': alone, in mixed batches, chunked, compiled, float32 and bf16."""

import pytest
import torch

from tests.engine_common.references import NEW_TOKENS, assert_bf16, assert_same, bf16_view, cases
from tests.tiers import matrix
from tests.tolerances import HALF_PRECISION_ERROR_RATIO

pytestmark = pytest.mark.engine

OURS = "vllm_model.model.Lfm2MoeForCausalLM"
MODELS = ["alpha", matrix("beta"), matrix("demo")]
NO_CACHE = {"enable_prefix_caching": False}


def prompts_of(name: str) -> list[list[int]]:
    return [case.prompt for case in cases(name)]


@pytest.mark.parametrize("model", MODELS)
def test_alone_and_in_mixed_batches(run, model):
    """200 prompts one after another, then all at once: 64 run together, prefills beside decodes."""
    step = {"prompts": prompts_of(model)}
    result = run(model, {"dtype": "float32", **NO_CACHE}, [{**step, "alone": True}, step])
    assert result["class"] == [OURS]
    assert_same(result["steps"][0], cases(model))
    assert_same(result["steps"][1], cases(model))
    together = max(len(s["tokens"]) for s in result["scheduled"])
    assert together == 64


@pytest.mark.parametrize("model", ["alpha", *(matrix(m) for m in ("beta", "demo"))])
def test_compiled(run, model):
    step = {"prompts": prompts_of(model)}
    result = run(model, {"dtype": "float32", "enforce_eager": False, **NO_CACHE}, [step])
    assert_same(result["steps"][0], cases(model))


@pytest.mark.parametrize(
    ("model", "budget"),
    [matrix("alpha", 16), ("beta", 48), matrix("alpha", 100), matrix("beta", 256)],
)
def test_chunked_prefill(run, model, budget):
    """No step takes more than ``budget`` tokens, so a prompt of 2,000 takes up to 125 of them."""
    engine = {"dtype": "float32", "max_num_batched_tokens": budget, "max_num_seqs": 16, **NO_CACHE}
    result = run(model, engine, [{"prompts": prompts_of(model)}])
    assert_same(result["steps"][0], cases(model))
    sizes = [sum(s["tokens"].values()) for s in result["scheduled"]]
    assert max(sizes) == budget


@pytest.mark.parametrize("compiled", [False, matrix(True)], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "model",
    ["alpha-calm", *(matrix(m) for m in ("beta-calm", "demo"))],
)
def test_bfloat16(run, model, compiled):
    """Decoding, and on forced text (prefill): no further from float32 than twice transformers' bf16."""
    texts = [c.prompt + c.expected.tokens for c in cases(model)]
    steps = [
        {"prompts": prompts_of(model), "params": {"logprobs": 0}},
        {"prompts": texts, "params": {"max_tokens": 1, "prompt_logprobs": 0}},
    ]
    engine = {"dtype": "bfloat16", "enforce_eager": not compiled, **NO_CACHE}
    decoded, forced = run(model, engine, steps)["steps"]
    assert_bf16(model, decoded)
    exact = torch.tensor([c.expected.logprobs for c in cases(model)])
    theirs = torch.tensor([view.logprobs for view in bf16_view(model)])
    ours = torch.tensor([out["prompt_logprobs"][-NEW_TOKENS:] for out in forced])
    allowed = HALF_PRECISION_ERROR_RATIO * (theirs - exact).abs().mean()
    assert (ours - exact).abs().mean() <= allowed


@pytest.mark.matrix
def test_chunked_prefill_bfloat16(run):
    engine = {"dtype": "bfloat16", "max_num_batched_tokens": 48, "max_num_seqs": 16, **NO_CACHE}
    step = {"prompts": prompts_of("alpha-calm"), "params": {"logprobs": 0}}
    assert_bf16("alpha-calm", run("alpha-calm", engine, [step])["steps"][0])
