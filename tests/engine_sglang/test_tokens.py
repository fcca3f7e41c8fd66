"""Greedy tokens equal to transformers': alone, in mixed batches, chunked, float32 and bf16.

The suite of vLLM compares with the same cached reference and the same prompts, so what passes here and
there gives the same tokens in both engines.
"""

import pytest
import torch

from tests.engine_common.references import (
    NEW_TOKENS,
    Case,
    assert_bf16,
    assert_same,
    bf16_view,
    cases,
)
from tests.tiers import matrix
from tests.tolerances import HALF_PRECISION_ERROR_RATIO

pytestmark = pytest.mark.engine

OURS = "sglang_model.model.Lfm2MoeForCausalLM"
MODELS = ["alpha", matrix("beta"), matrix("demo")]
NO_CACHE = {"disable_radix_cache": True}


def prompts_of(name: str) -> list[list[int]]:
    return [case.prompt for case in cases(name)]


@pytest.mark.parametrize("model", MODELS)
def test_alone_and_in_mixed_batches(run, model):
    """200 prompts one after another, then all at once: 64 run together."""
    step = {"prompts": prompts_of(model)}
    alone = {**step, "alone": True, "params": {"max_new_tokens": NEW_TOKENS // 2}}
    result = run(model, {"dtype": "float32", **NO_CACHE}, [alone, step])
    assert result["class"] == [OURS]
    assert result["options"]["attention_backend"] == "lfm2_cpu"
    assert_same(result["steps"][0], cases(model))
    assert_same(result["steps"][1], cases(model))
    decodes = [len(s["tokens"]) for s in result["scheduled"] if s["mode"] == "DECODE"]
    assert max(decodes) > 60  # 64 are let in, and some may end while others are still read


@pytest.mark.matrix
def test_sglangs_own_attention(run):
    """The backend that a user names stays, and gives the same tokens."""
    engine = {"dtype": "float32", "attention_backend": "torch_native", **NO_CACHE}
    result = run("beta", engine, [{"prompts": prompts_of("beta")}])
    assert result["options"]["attention_backend"] == "torch_native"
    assert_same(result["steps"][0], cases("beta"))


def in_pieces(model: str, size: int, most: int = 40) -> list[Case]:
    """The cases whose prompt is read in at most so many pieces: of 2,000 tokens only where time allows."""
    return [c for c in cases(model) if len(c.prompt) <= most * size]


@pytest.mark.parametrize(
    ("model", "size"),
    [matrix("alpha", 16), matrix("beta", 16), ("beta", 64), matrix("alpha", 256)],
)
def test_chunked_prefill(run, model, size):
    """No prefill takes more than ``size`` tokens, so a prompt of 2,000 takes up to 125 of them."""
    engine = {"dtype": "float32", "chunked_prefill_size": size, **NO_CACHE}
    asked = in_pieces(model, size, most=125 if model == "alpha" else 40)
    result = run(model, engine, [{"prompts": [c.prompt for c in asked]}])
    assert_same(result["steps"][0], asked)
    sizes = [sum(s["tokens"]) for s in result["scheduled"] if s["mode"] == "EXTEND"]
    assert max(sizes) == size


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("alpha", 16),
        matrix("alpha", 256),
        matrix("beta", 16),
        matrix("beta", 256),
        matrix("demo", 256),
    ],
)
def test_mixed_chunk(run, model, size):
    """Prefills take the running decodes along in one batch."""
    engine = {"dtype": "float32", "chunked_prefill_size": size, "enable_mixed_chunk": True}
    asked = in_pieces(model, size)
    result = run(model, {**engine, **NO_CACHE}, [{"prompts": [c.prompt for c in asked]}])
    assert_same(result["steps"][0], asked)
    mixed = [s["tokens"] for s in result["scheduled"] if s["mode"] == "MIXED"]
    assert len(mixed) > 10
    assert any(max(tokens) > 1 and tokens.count(1) > 1 for tokens in mixed)


@pytest.mark.parametrize("model", ["alpha-calm", matrix("beta-calm"), matrix("demo")])
def test_bfloat16(run, model):
    """Decoding, and on forced text (prefill): no further from float32 than twice transformers' bf16."""
    texts = [c.prompt + c.expected.tokens for c in cases(model)]
    steps = [
        {"prompts": prompts_of(model), "params": {"logprobs": 0}},
        {"prompts": texts, "params": {"max_new_tokens": 1, "prompt_logprobs": True}},
    ]
    decoded, forced = run(model, {"dtype": "bfloat16", **NO_CACHE}, steps)["steps"]
    assert_bf16(model, decoded)
    exact = torch.tensor([c.expected.logprobs for c in cases(model)])
    theirs = torch.tensor([view.logprobs for view in bf16_view(model)])
    ours = torch.tensor([out["prompt_logprobs"][-NEW_TOKENS:] for out in forced])
    allowed = HALF_PRECISION_ERROR_RATIO * (theirs - exact).abs().mean()
    assert (ours - exact).abs().mean() <= allowed


@pytest.mark.matrix
def test_chunked_prefill_bfloat16(run):
    engine = {"dtype": "bfloat16", "chunked_prefill_size": 48, **NO_CACHE}
    step = {"prompts": prompts_of("alpha-calm"), "params": {"logprobs": 0}}
    assert_bf16("alpha-calm", run("alpha-calm", engine, [step])["steps"][0])
