"""The reference against transformers, on three random models that differ in everything."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Lfm2MoeForCausalLM

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import CheckpointError
from lfm2_plugin.reference import Cache, ReferenceModel
from tests import tiny
from tests.tolerances import HALF_PRECISION_ERROR_RATIO, assert_within

CONFIGS = {
    "default": {},
    "wide-heads": tiny.WIDE_HEADS,
    "untied": tiny.UNTIED,
    "wide-kernel": {"num_hidden_layers": 3, "conv_L_cache": 8, "conv_bias": True},
}


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def models(request, tmp_path_factory) -> tuple[ReferenceModel, Lfm2MoeForCausalLM]:
    folder = tiny.make_checkpoint(tmp_path_factory.mktemp("model"), seed=3, **request.param)
    theirs = Lfm2MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return ReferenceModel.from_folder(folder), theirs


def make_tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 512, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def hf_logits(model: Lfm2MoeForCausalLM, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("length", [1, 2, 3, 60])
def test_prefill(models, length: int) -> None:
    ours, theirs = models
    tokens = make_tokens(length)
    assert_within("logits", ours.forward(tokens, Cache()), hf_logits(theirs, tokens))


@pytest.mark.parametrize("first", [1, 20])
def test_decode_equals_prefill(models, first: int) -> None:
    ours, theirs = models
    tokens = make_tokens(32, seed=1)
    cache = Cache()
    pieces = [ours.forward(tokens[:first], cache)]
    pieces += [ours.forward([token], cache) for token in tokens[first:]]
    assert_within("logits", torch.cat(pieces), hf_logits(theirs, tokens))
    assert cache.length == 32


def test_pieces_equal_whole(models) -> None:
    ours, theirs = models
    tokens = make_tokens(33, seed=2)
    cache, pieces, start = Cache(), [], 0
    for n in (7, 1, 2, 16, 7):
        pieces.append(ours.forward(tokens[start : start + n], cache))
        start += n
    assert_within("logits", torch.cat(pieces), hf_logits(theirs, tokens))


def test_greedy(models) -> None:
    ours, theirs = models
    prompt = make_tokens(9, seed=4)
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    assert ours.generate(prompt, 24) == expected[0, 9:].tolist()


def test_bfloat16(tmp_path) -> None:
    """Error against float32 within the contract's multiple of that of transformers."""
    folder = tiny.make_checkpoint(tmp_path, seed=5, num_hidden_layers=4)
    tokens = make_tokens(64, seed=5)
    exact = ReferenceModel.from_folder(folder).forward(tokens, Cache())
    theirs = Lfm2MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ours = ReferenceModel.from_folder(folder, torch.bfloat16).forward(tokens, Cache())

    def error(logits: torch.Tensor) -> torch.Tensor:
        return (logits.float() - exact).pow(2).mean().sqrt()

    assert error(ours) <= HALF_PRECISION_ERROR_RATIO * error(hf_logits(theirs, tokens))


def test_wrong_tensors_are_refused() -> None:
    arch = Lfm2MoeArch.from_config(tiny.make_config())
    with pytest.raises(CheckpointError, match="missing"):
        ReferenceModel(arch, {}, torch.float32)


def test_rope_type_is_refused(tmp_path) -> None:
    folder = tiny.make_checkpoint(tmp_path, num_hidden_layers=3)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no rotary embedding of type 'linear'"):
        ReferenceModel.from_folder(folder)
