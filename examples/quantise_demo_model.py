"""Quantise the demo model with llm-compressor, once for each of its usual schemes: a minute on one core.

    make quantised-checkpoints                                      # into .cache/quantised
    python examples/quantise_demo_model.py OUT --only w8a8 nvfp4    # in an environment with llm-compressor

Each folder is a checkpoint as the tool saves it; ``manifest.json`` beside them says what each holds. Calibration runs
on the demo model's own training questions, seeded, so a second run writes the same tensors.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import model_free_ptq, oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import lfm2_plugin.demo
from lfm2_plugin.demo.tasks import questions

SEED = 0
QUESTIONS = 8  # to calibrate with
LONGEST = 256  # tokens of a question
CONV = r"re:.*conv\.conv$"
EMBEDDING = "model.embed_tokens"
# What a sensible user leaves out: the head, the router, and the convolution itself.
USUAL = ("lm_head", r"re:.*feed_forward\.gate$", CONV)
HEAD_ONLY = ("lm_head",)
EXPERTS = r"re:.*feed_forward\.experts\..*"


@dataclass(frozen=True)
class Recipe:
    """One checkpoint.

    Attributes:
        scheme: a preset of compressed-tensors, or groups of its config written out.
        ignore: what is left unquantised.
        calibrated: activations need static scales.
        model_free: quantised file by file: the hub's names of tensors, patterns stay patterns in the config, and what
            is a linear layer goes by the names.
    """

    scheme: str | dict[str, Any]
    ignore: tuple[str, ...] = USUAL
    calibrated: bool = False
    model_free: bool = False


def int4(group: int, *targets: str) -> dict[str, Any]:
    """A group of the config: 4-bit integers, ``group`` weights of which share a scale."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
    }
    return {"targets": list(targets), "weights": weights}


RECIPES = {
    "w8a8": Recipe("W8A8"),
    "w8a8-head-only": Recipe("W8A8", HEAD_ONLY),
    "w4a16-g32": Recipe({"group_0": int4(32, "Linear")}),
    # The experts are 64 wide, so groups of 128 don't fit them: left out, or in groups of 32.
    "w4a16-g128": Recipe("W4A16", (*USUAL, EXPERTS)),
    "w4a16-g128-experts-g32": Recipe(
        {"group_0": int4(128, "Linear"), "group_1": int4(32, EXPERTS)}
    ),
    "fp8-dynamic": Recipe("FP8_DYNAMIC"),
    "fp8-dynamic-head-only": Recipe("FP8_DYNAMIC", HEAD_ONLY),
    "nvfp4": Recipe("NVFP4", calibrated=True),
    "w8a8-model-free": Recipe("W8A8", (*USUAL, EMBEDDING), model_free=True),
    "fp8-dynamic-router": Recipe("FP8_DYNAMIC", (*HEAD_ONLY, EMBEDDING, CONV), model_free=True),
}


def quantise(recipe: Recipe, folder: Path) -> None:
    """Write one checkpoint with the tokenizer and chat template beside it."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the same sums on every machine
    source = lfm2_plugin.demo.model_path()
    if recipe.model_free:
        model_free_ptq(source, folder, recipe.scheme, ignore=recipe.ignore, device="cpu")
        return
    tokenizer = AutoTokenizer.from_pretrained(source)
    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    named = {"scheme": recipe.scheme} if isinstance(recipe.scheme, str) else {}
    written_out = {} if named else {"config_groups": recipe.scheme}
    modifier = QuantizationModifier(
        targets="Linear", ignore=list(recipe.ignore), **named, **written_out
    )
    data = {}
    if recipe.calibrated:
        data = {
            "dataset": calibration(tokenizer),
            "num_calibration_samples": QUESTIONS,
            "max_seq_length": LONGEST,
            "shuffle_calibration_samples": False,
            "pipeline": "basic",  # the whole model at once: it is small
        }
    oneshot(model=model, recipe=modifier, tokenizer=tokenizer, **data)
    model.save_pretrained(folder, save_compressed=True)
    tokenizer.save_pretrained(folder)


def calibration(tokenizer: Any) -> Dataset:
    """Training questions of the demo model, each with its answer, as token ids."""
    rows = []
    for question in questions(SEED, QUESTIONS, train=True):
        messages = [*question.messages, {"role": "assistant", "content": question.answer}]
        ids = tokenizer.apply_chat_template(messages, tools=question.tools, return_dict=False)
        rows.append({"input_ids": ids[:LONGEST], "attention_mask": [1] * len(ids[:LONGEST])})
    return Dataset.from_list(rows)


def describe(folder: Path) -> dict[str, Any]:
    """Size, quantization_config, and how many tensors of which name, dtype and shape a checkpoint holds."""
    kinds: Counter[str] = Counter()
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
                part = tensors.get_slice(name)
                kinds[f"{kind} {part.get_dtype()} {part.get_shape()}"] += 1
    config = json.loads((folder / "config.json").read_text())
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "quantization_config": config["quantization_config"],
        "tensors": dict(sorted(kinds.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path, help="folder for the checkpoints")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    arguments = parser.parse_args()
    tools = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    manifest: dict[str, Any] = {"made with": {tool: version(tool) for tool in tools}}
    for name in arguments.only:
        start = time.monotonic()
        folder = arguments.out / name
        shutil.rmtree(folder, ignore_errors=True)
        quantise(RECIPES[name], folder)
        manifest[name] = describe(folder)
        print(f"{folder}: {manifest[name]['bytes']:,} bytes, {time.monotonic() - start:.0f} s")
    (arguments.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
