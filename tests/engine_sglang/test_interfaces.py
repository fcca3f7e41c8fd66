"""What SGLang asks of a model beside tokens in and logits out, asked inside a running engine."""

from pathlib import Path

import pytest
import torch

from tests.engine_common.checkpoints import altered, checkpoint
from tests.engine_common.hf_reference import load
from tests.engine_common.references import NEW_TOKENS, assert_same, cases
from tests.tiers import matrix
from tests.tolerances import assert_within

pytestmark = pytest.mark.engine

COUNT = 40


@pytest.fixture
def engine(server):
    """Runs one float32 engine of the named checkpoint with steps of ``interface_jobs``."""

    def start(model: str | Path, steps: list[dict], **options) -> list:
        engine = {"dtype": "float32", "disable_radix_cache": True, **options}
        folder = str(checkpoint(model) if isinstance(model, str) else model)
        job = "interface_jobs:run_engine"
        return server.run(job, model=folder, engine=engine, steps=steps).get()["steps"]

    return start


@pytest.mark.parametrize("model", ["alpha", matrix("beta")])
def test_vectors_for_tokens(engine, model, tmp_path):
    """``input_embeds`` is used: the tokens' own vectors give the tokens' answers.

    SGLang rounds the vectors to bfloat16, so the checkpoint's are such that it changes nothing.
    """

    def rounded(tensors):
        name = "model.embed_tokens.weight"
        tensors[name] = tensors[name].bfloat16().float()

    folder = altered(checkpoint(model), tmp_path / "rounded", rounded)
    prompts = [c.prompt for c in cases(model, COUNT)]
    steps = [
        {"prompts": prompts, "params": {"max_new_tokens": NEW_TOKENS}},
        {"op": "embeddings", "prompts": prompts, "folder": str(folder), "tokens": NEW_TOKENS},
    ]
    by_ids, by_vectors = engine(folder, steps)
    assert [out["tokens"] for out in by_vectors] == [out["tokens"] for out in by_ids]
    assert len({tuple(out["tokens"]) for out in by_ids}) > COUNT / 2


@pytest.mark.parametrize(
    ("method", "layers", "inputs"),
    [
        matrix("set_eagle3_layers_to_capture", None, [2, 3]),
        ("set_eagle3_layers_to_capture", [0, 4, 5], [1, 5, 6]),
        ("set_dflash_layers_to_capture", [1, 5], [2, 6]),
    ],
)
def test_drafters_get_what_the_layers_saw(engine, method, layers, inputs):
    """Each layer's input as in transformers; the last one's output, before the final norm, too."""
    prompts = [c.prompt for c in cases("alpha", COUNT)][10:14]
    arguments = {"method": method, "layers": layers}
    asked, found = engine(
        "alpha",
        [
            {
                "op": "probe",
                "module": "tests.engine_sglang.interface_jobs",
                "name": "capture",
                **arguments,
            },
            {"op": "hidden_states", "prompts": prompts},
        ],
        enable_return_hidden_states=True,
    )
    assert asked == inputs
    for prompt, states in zip(prompts, found, strict=True):
        expected = layer_inputs("alpha", prompt)[:, inputs].flatten(1)
        assert_within("logits", torch.tensor(states), expected)


def layer_inputs(model: str, prompt: list[int]) -> torch.Tensor:
    """(tokens, layers + 1, channels): what enters each layer in transformers, and what leaves the last."""
    reference = load(checkpoint(model), torch.float32)
    seen = []
    for layer in reference.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    reference.model.layers[-1].register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        reference(torch.tensor([prompt]))
    return torch.stack([states[0] for states in seen], dim=1)


@pytest.mark.parametrize("model", [matrix("alpha"), "beta"])
def test_a_drafter_may_share_embedding_and_head(engine, model):
    probe = {
        "op": "probe",
        "module": "tests.engine_sglang.interface_jobs",
        "name": "shared_with_a_drafter",
    }
    (shapes,) = engine(model, [probe])
    config = load(checkpoint(model), torch.float32).config
    assert shapes == [[config.vocab_size, config.hidden_size]] * 2


def test_without_selection_bias(run):
    """A model that chooses its experts by the scores alone."""
    result = run(
        "unbiased",
        {"dtype": "float32"},
        [{"prompts": [c.prompt for c in cases("unbiased", COUNT)]}],
    )
    assert_same(result["steps"][0], cases("unbiased", COUNT))
