"""Checkpoints that are broken in one way each, and what a user has to be told whatever the engine."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from tests.engine_common.checkpoints import altered, checkpoint

Make = Callable[[Path], Path]  # makes the checkpoint in a folder that isn't there yet


def with_config(**changes) -> Make:
    return lambda folder: altered(checkpoint("small"), folder, config=changes)


def with_tensors(change: Callable[[dict], None]) -> Make:
    return lambda folder: altered(checkpoint("small"), folder, change)


def without(*names: str) -> Make:
    def drop(tensors: dict) -> None:
        for name in names:
            del tensors[name]

    return with_tensors(drop)


def with_an_extra_tensor(tensors: dict) -> None:
    tensors["model.layers.0.conv.gate.weight"] = torch.zeros(4)


def with_a_narrow_matrix(tensors: dict) -> None:
    name = "model.layers.0.feed_forward.w2.weight"
    tensors[name] = tensors[name][:, :-32].clone()


def truncated(folder: Path) -> Path:
    shutil.copytree(checkpoint("small"), folder)
    (file,) = folder.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    return folder


def without_a_shard(folder: Path) -> Path:
    """The index names a file that isn't there, as after a download that was cut off."""
    shutil.copytree(checkpoint("small"), folder)
    (file,) = folder.glob("*.safetensors")
    names = ["model.embed_tokens.weight", "model.embedding_norm.weight"]
    index = {name: file.name for name in names} | {
        "model.layers.1.ffn_norm.weight": "model-00002-of-00002.safetensors"
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def with_three_experts(folder: Path) -> Path:
    """Whole, but three experts can't be divided over two ranks."""

    def seventh(tensors: dict) -> None:
        for name in [n for n in tensors if ".experts.3." in n]:
            del tensors[name]
        for name in [n for n in tensors if n.endswith(("gate.weight", "expert_bias"))]:
            tensors[name] = tensors[name][:3].clone()

    return altered(checkpoint("small"), folder, seventh, {"num_experts": 3})


CONV, QUERY = "model.layers.0.conv.conv.weight", "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.1.feed_forward.experts.2.w3.weight"
BROKEN: dict[str, tuple[Make, tuple[str, ...]]] = {
    # Another model's config that says it is ours: what a wrongly edited folder looks like.
    "config of another model": (
        with_config(model_type="lfm2", architectures=["Lfm2MoeForCausalLM"]),
        ("model_type 'lfm2'", "serves only 'lfm2_moe'"),
    ),
    # In vLLM transformers' own check of the config speaks first.
    "layer types that do not match": (
        with_config(layer_types=["conv", "full_attention", "conv"]),
        (
            "`num_hidden_layers` (2) must be equal to the number of `layer_types` (3)"
            "|layer_types has 3 entries for num_hidden_layers 2",
        ),
    ),
    "unknown layer type": (
        with_config(layer_types=["conv", "sliding_attention"]),
        ("sliding_attention", "known are conv and full_attention"),
    ),
    "missing tensors": (without(CONV, QUERY), ("missing: ", CONV, QUERY)),
    "missing expert": (without(EXPERT), (EXPERT,)),
    "extra tensor": (with_tensors(with_an_extra_tensor), ("model.layers.0.conv.gate.weight",)),
    "wrong shape": (
        with_tensors(with_a_narrow_matrix),
        ("model.layers.0.feed_forward.w2.weight", "[128, 224]", "[128, 256]"),
    ),
    "truncated file": (truncated, ("model.safetensors", "truncated")),
    "missing shard": (without_a_shard, ("model-00002-of-00002.safetensors",)),
    "unknown quantisation": (
        with_config(quantization_config={"quant_method": "shrink9000"}),
        ("shrink9000",),
    ),
}
"""Name -> how it is made, and words of the one error, alternatives between bars."""


def unsaid(words: tuple[str, ...], text: str) -> list[str]:
    """The words that a text lacks."""
    return [word for word in words if not any(one in text for one in word.split("|"))]


def refused(run, model, engine: dict, long_work: tuple[str, ...], **options) -> str:
    """What the user reads when the engine doesn't start: the error and the log.

    Args:
        long_work: what the log would say of work that should not have been begun.
    """
    outcome = run.outcome(model, engine, [], **options)
    assert outcome.error is not None, "the engine started"
    text = f"{outcome.error}\n{outcome.log}"
    assert not [mark for mark in long_work if mark in text]
    return text
