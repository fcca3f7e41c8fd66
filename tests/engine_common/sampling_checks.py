"""What the answers that users ask for beside greedy tokens have to be like, whatever the engine."""

import json
import math
from collections.abc import Callable

import pytest
import torch

from lfm2_plugin.demo.tasks import questions
from tests.engine_common.checkpoints import DEMO
from tests.engine_common.demo_reference import prompt_ids

QUESTIONS = 24
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Oslo", "Lima", "Quito"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["city", "count"],
    "additionalProperties": False,
}


def first_tokens_follow(exact: torch.Tensor, completions: list[dict]) -> None:
    """The first tokens of many completions against their probabilities (V,), within four standard deviations."""
    drawn = torch.zeros_like(exact)
    for completion in completions:
        drawn[completion["tokens"][0]] += 1
    count = int(drawn.sum())
    for token in exact.topk(8).indices:
        share = exact[token].item()
        deviation = math.sqrt(share * (1 - share) / count)
        assert drawn[token].item() / count == pytest.approx(share, abs=4 * deviation + 1 / count)


def texts_of(generate: Callable[[list[dict]], list[list[dict]]], length: str) -> dict[str, list]:
    """Free answers of the demo model, the same with stop strings, and half of them under a JSON schema.

    Args:
        generate: runs steps in an engine of the demo model and gives a result for each.
        length: the engine's name of the option that limits an answer.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    prompts = [prompt_ids(tokenizer, q) for q in questions(seed=11, n=QUESTIONS)]
    free = {length: 40, "ignore_eos": False}
    (first,) = generate([{"prompts": prompts, "params": free}])
    stops = [out["text"][len(out["text"]) // 2 :][:2] for out in first]
    stopped = [{**free, "stop": [s]} if s else {} for s in stops]
    structured = {"json_schema": SCHEMA, length: 80, "ignore_eos": False}
    mixed = [structured if i % 2 else free for i in range(QUESTIONS)]
    second = generate([{"prompts": prompts, "params": params} for params in (stopped, mixed)])
    return {"free": first, "stops": stops, "stopped": second[0], "mixed": second[1]}


def stop_strings_cut_the_text(texts: dict[str, list]) -> None:
    tried = 0
    for free, stop, out in zip(texts["free"], texts["stops"], texts["stopped"], strict=True):
        if not stop:
            continue
        tried += 1
        assert out["text"] == free["text"][: free["text"].index(stop)]
        assert out["finish"] == "stop"
        assert out["stop"] == stop
    assert tried > 10


def structured_output_beside_free_answers(texts: dict[str, list]) -> None:
    for index, out in enumerate(texts["mixed"]):
        if index % 2 == 0:
            assert out["text"] == texts["free"][index]["text"]
        else:
            assert out["finish"] == "stop"
            value = json.loads(out["text"])
            assert value["city"] in ("Oslo", "Lima", "Quito")
            assert 0 <= value["count"] <= 99
