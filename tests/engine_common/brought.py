"""Checkpoints as people bring them: other layouts, names, dtypes and files of the checkpoint "slim", served right or
refused in words. ``docs/checkpoints.md`` has the table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.engine_common.checkpoints import altered, checkpoint
from tests.engine_common.int8_weights import W8A8, w8a8

Tensors = dict[str, torch.Tensor]
SOURCE = "slim"
EXPERTS = "model.layers.1.feed_forward.experts"
QUERY = "model.layers.1.self_attn.q_proj.weight"
OUT = "model.layers.0.conv.out_proj.weight"


@dataclass(frozen=True)
class Brought:
    """One kind of checkpoint.

    Attributes:
        tensors: changes the tensors of SOURCE.
        config: entries of config.json that differ.
        files: rewrites a folder that has them in one file, where the kind is about files.
        refused: words of the error; empty where it is served with SOURCE's tokens.
    """

    tensors: Callable[[Tensors], None] = lambda tensors: None
    config: dict[str, Any] | None = None
    files: Callable[[Path], None] = lambda folder: None
    refused: tuple[str, ...] = ()

    def make(self, folder: Path) -> Path:
        """Write it to a folder that isn't there yet."""
        altered(checkpoint(SOURCE), folder, self.tensors, self.config)
        self.files(folder)
        return folder


def experts_of(tensors: Tensors) -> dict[str, torch.Tensor]:
    """w1, w2, w3 of the one layer with experts, stacked (experts, rows, columns); they leave ``tensors``."""
    taken: dict[str, list[torch.Tensor]] = {"w1": [], "w2": [], "w3": []}
    for expert in range(4):
        for matrix, found in taken.items():
            found.append(tensors.pop(f"{EXPERTS}.{expert}.{matrix}.weight"))
    return {matrix: torch.stack(found) for matrix, found in taken.items()}


def stacked(joined: str, down: str, suffix: str = "") -> Callable[[Tensors], None]:
    """Both of transformers' stacks, under these names."""

    def change(tensors: Tensors) -> None:
        w = experts_of(tensors)
        tensors[f"{EXPERTS}.{joined}{suffix}"] = torch.cat([w["w1"], w["w3"]], dim=1)
        tensors[f"{EXPERTS}.{down}{suffix}"] = w["w2"]

    return change


def three_stacks(tensors: Tensors) -> None:
    for matrix, stack in experts_of(tensors).items():
        name = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[matrix]
        tensors[f"{EXPERTS}.{name}.weight"] = stack


def transposed(tensors: Tensors) -> None:
    stacked("gate_up_proj", "down_proj")(tensors)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        tensors[name] = tensors[name].transpose(1, 2).contiguous()


def joined_in_each_expert(tensors: Tensors) -> None:
    w = experts_of(tensors)
    for expert in range(4):
        place = f"{EXPERTS}.{expert}"
        tensors[f"{place}.w13.weight"] = torch.cat([w["w1"][expert], w["w3"][expert]])
        tensors[f"{place}.w2.weight"] = w["w2"][expert].clone()


def twice(tensors: Tensors) -> None:
    held = dict(tensors)
    stacked("gate_up_proj", "down_proj")(tensors)
    tensors |= held


def renamed(rename: Callable[[str], str]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    return change


def as_llm_compressor(name: str) -> str:
    if ".feed_forward." not in name or name.endswith(("gate.weight", "expert_bias")):
        return name
    for hub, other in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        name = name.replace(f".{hub}.", f".{other}.")
    return name


def squeezed(tensors: Tensors) -> None:
    tensors["model.layers.0.conv.conv.weight"] = tensors["model.layers.0.conv.conv.weight"].squeeze(
        1
    )


def as_mlx(tensors: Tensors) -> None:
    for matrix, stack in experts_of(tensors).items():
        name = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[matrix]
        tensors[f"model.layers.1.feed_forward.switch_mlp.{name}.weight"] = stack
    name = "model.layers.0.conv.conv.weight"
    tensors[name] = tensors[name].transpose(1, 2).contiguous()


def with_a_copied_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def int8_weights(*, scales: bool) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        values, scale = w8a8(tensors[QUERY])
        tensors[QUERY] = values
        if scales:
            tensors[f"{QUERY}_scale"] = scale

    return change


def fp8_weight(tensors: Tensors) -> None:
    tensors[QUERY] = tensors[QUERY].to(torch.float8_e4m3fn)


def a_scale_less(tensors: Tensors) -> None:
    quantised(tensors)
    del tensors[f"{OUT}_scale"]


def quantised(tensors: Tensors, keep: Callable[[str], bool] = lambda name: False) -> None:
    """Projections and the dense MLP in int8, except those that ``keep`` names."""
    for name in list(tensors):
        linear = name.endswith("_proj.weight") or ".layers.0.feed_forward.w" in name
        if linear and not keep(name):
            tensors[name], tensors[f"{name}_scale"] = w8a8(tensors[name])


def in_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for part in range(2):
        file = f"model-0000{part + 1}-of-00002.safetensors"
        save_file({n: tensors[n] for n in names[part::2]}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names[part::2], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def with_a_stray_file(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        in_shards(folder)
        save_file({QUERY: torch.zeros(1)}, folder / name, {"format": "pt"})

    return change


def as_bin(
    change: Callable[[dict[str, Any]], None] = lambda tensors: None,
) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors: dict[str, Any] = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        change(tensors)
        torch.save(tensors, folder / "pytorch_model.bin")

    return rewrite


class Shell:
    """A pickle that runs a command where it is loaded without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def int8(*ignore: str) -> dict[str, Any]:
    return {"quantization_config": {**W8A8, "ignore": ["lm_head", *ignore]}}


NO_EXPERTS = ("re:.*feed_forward.gate$", r"re:.*experts\..*")
PLAIN: dict[str, Brought] = {
    "stacked experts": Brought(stacked("gate_up_proj", "down_proj")),
    "stacked experts, .weight": Brought(stacked("gate_up_proj", "down_proj", ".weight")),
    "stacked w13 and w2": Brought(stacked("w13", "w2", "_weight")),
    "three stacks": Brought(three_stacks),
    "llm-compressor's names": Brought(renamed(as_llm_compressor)),
    "w13 in each expert": Brought(joined_in_each_expert),
    "squeezed convolution": Brought(squeezed),
    "shards": Brought(files=in_shards),
    "shards and a stray file": Brought(files=with_a_stray_file("adapter.safetensors")),
    "shards and a consolidated file": Brought(files=with_a_stray_file("consolidated.safetensors")),
    "PyTorch's .bin": Brought(files=as_bin()),
    "a tied head's copy": Brought(with_a_copied_head),
}
"""Served with the tokens of SOURCE."""

REFUSED: dict[str, Brought] = {
    "MLX": Brought(as_mlx, refused=("an MLX checkpoint", "switch_mlp")),
    "transposed stacks": Brought(transposed, refused=("transposed", "gate_up_proj")),
    "no prefix": Brought(
        renamed(lambda name: name.removeprefix("model.")), refused=("prefix 'model.'",)
    ),
    "vision-language prefix": Brought(
        renamed(lambda name: f"language_model.{name}"), refused=("vision-language",)
    ),
    "training wrapper": Brought(renamed(lambda n: f"module.{n}"), refused=("training wrapper",)),
    "experts twice": Brought(twice, refused=("came twice", f"{EXPERTS}.gate_up_proj")),
    "untied without a head": Brought(
        config={"tie_word_embeddings": False}, refused=("missing: lm_head.weight",)
    ),
    "int8 and no config": Brought(
        int8_weights(scales=False),
        refused=(f"{QUERY} is I8, not BF16", "there is no quantisation config"),
    ),
    "int8 with scales and no config": Brought(
        int8_weights(scales=True), refused=(f"{QUERY}_scale", "there is no quantisation config")
    ),
    "fp8 and no config": Brought(fp8_weight, refused=(f"{QUERY} is F8_E4M3, not BF16",)),
    "int8 promised and plain": Brought(
        config=int8(*NO_EXPERTS), refused=(f"{QUERY} is F32, not I8", "W8A8 int8")
    ),
    "a scale is missing": Brought(
        a_scale_less, int8(*NO_EXPERTS), refused=(f"missing: {OUT}_scale",)
    ),
    "int8 where the config ignores": Brought(
        quantised, int8(*NO_EXPERTS, r"re:.*\.conv\.(in|out)_proj$"), refused=(f"{OUT} is I8",)
    ),
    "a pickle with a command": Brought(
        files=as_bin(lambda tensors: tensors.update(x=Shell())),
        refused=("pytorch_model.bin", "a pickle with more in it than tensors"),
    ),
}


def in_format(make: Callable[[int, int], dict[str, torch.Tensor]]) -> Callable[[Tensors], None]:
    """Every projection, dense matrix and expert in a format, by (rows, columns); the numbers are never reached."""

    def change(tensors: Tensors) -> None:
        for name in [
            n
            for n in tensors
            if n.endswith("_proj.weight") or ".feed_forward.w" in n or ".experts." in n
        ]:
            module, (rows, columns) = name.removesuffix(".weight"), tensors.pop(name).shape
            tensors |= {f"{module}.{last}": tensor for last, tensor in make(rows, columns).items()}

    return change


def gptq(rows: int, columns: int) -> Tensors:
    return {
        "qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        "qzeros": torch.zeros(columns // 32, rows // 8, dtype=torch.int32),
        "scales": torch.ones(columns // 32, rows, dtype=torch.float16),
        "g_idx": (torch.arange(columns) // 32).int(),
    }


def awq(rows: int, columns: int) -> Tensors:
    return {
        "qweight": torch.zeros(columns, rows // 8, dtype=torch.int32),
        "qzeros": torch.zeros(columns // 32, rows // 8, dtype=torch.int32),
        "scales": torch.ones(columns // 32, rows, dtype=torch.float16),
    }


def nvfp4(rows: int, columns: int) -> Tensors:
    return {
        "weight": torch.zeros(rows, columns // 2, dtype=torch.uint8),
        "weight_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.ones(()),
        "input_scale": torch.ones(()),
    }


def fp8_block(rows: int, columns: int) -> Tensors:
    return {
        "weight": torch.zeros(rows, columns).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.ones(-(-rows // 128), -(-columns // 128)),
    }


def bitsandbytes(rows: int, columns: int) -> Tensors:
    return {
        "weight": torch.zeros(rows * columns // 2, 1, dtype=torch.uint8),
        "weight.absmax": torch.ones(rows * columns // 64),
        "weight.quant_map": torch.zeros(16),
    }


def method(name: str, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": name, **settings}}


GROUPS = {"bits": 4, "group_size": 32}
FORMATS: dict[str, Brought] = {
    "GPTQ": Brought(
        in_format(gptq), method("gptq", desc_act=False, sym=True, **GROUPS), refused=("gptq",)
    ),
    "AWQ": Brought(
        in_format(awq),
        method(
            "awq",
            zero_point=True,
            version="gemm",
            modules_to_not_convert=["feed_forward.gate"],
            **GROUPS,
        ),
        refused=("awq",),
    ),
    "NVFP4 of ModelOpt": Brought(
        in_format(nvfp4),
        method(
            "modelopt", quant_algo="NVFP4", ignore=["lm_head", "model.layers.*.feed_forward.gate"]
        ),
        refused=("modelopt",),
    ),
    "FP8 by blocks": Brought(
        in_format(fp8_block),
        method(
            "fp8",
            activation_scheme="dynamic",
            weight_block_size=[128, 128],
            modules_to_not_convert=["lm_head", "model.layers.1.feed_forward.gate"],
        ),
        refused=("fp8",),
    ),
    "bitsandbytes": Brought(
        in_format(bitsandbytes),
        method("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        refused=("bitsandbytes",),
    ),
    "torchao": Brought(
        config=method(
            "torchao", quant_type={"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}
        ),
        refused=("torchao",),
    ),
}
"""Formats that have no kernels on a CPU, or that aren't supported at all; the error names the method."""

CONV = "model.layers.0.conv"
NO_CONV: dict[str, Brought] = {
    way: Brought(
        lambda tensors: quantised(tensors, lambda name: CONV in name), int8(*NO_EXPERTS, *ignore)
    )
    for way, ignore in {
        "full names": (f"{CONV}.in_proj", f"{CONV}.out_proj"),
        "an anchored expression": (r"re:.*\.conv\.(in|out)_proj$",),
        "a loose expression": ("re:.*conv.*",),
    }.items()
}
"""One int8 checkpoint whose convolutions are left as they are, and ways to say so in the config."""


def dequantised(folder: Path) -> Path:
    """NO_CONV with every weight multiplied out, for the reference."""

    def change(tensors: Tensors) -> None:
        quantised(tensors, lambda name: CONV in name)
        for name in [n for n in tensors if n.endswith("_scale")]:
            weight = name.removesuffix("_scale")
            tensors[weight] = tensors[weight].float() * tensors.pop(name)

    return altered(checkpoint(SOURCE), folder, change)


def with_another_head(folder: Path) -> Path:
    """A head of its own under a config that says the head is the embedding."""

    def change(tensors: Tensors) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(3))
        tensors["lm_head.weight"] = embedding + embedding.std() * noise

    return altered(checkpoint(SOURCE), folder, change)
