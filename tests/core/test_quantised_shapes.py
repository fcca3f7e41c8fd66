"""Shapes of quantised tensors: those of the formats pass, any other is refused by tensor, shape and reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import CheckpointError
from lfm2_plugin.checkpoint.ledger import Ledger, plan_of
from lfm2_plugin.checkpoint.names import expected_tensors
from lfm2_plugin.checkpoint.quantisation import UnsupportedQuantisation, read_plan
from lfm2_plugin.checkpoint.readers import Header, dtype_name
from lfm2_plugin.checkpoint.report import CheckpointReport
from tests import tiny
from tests.engine_common.brought import awq, fp8_block, gptq, nvfp4

Shapes = dict[str, tuple[str, tuple[int, ...]]]
ARCH = Lfm2MoeArch.from_config(tiny.make_config())
MODULE = "model.layers.0.feed_forward.w2"  # 128 rows, more columns
ROWS, COLUMNS = expected_tensors(ARCH)[f"{MODULE}.weight"]


def survey(config: dict[str, Any], made: Shapes, **others: tuple[str, tuple[int, ...]]):
    """The report on a model of which one module is quantised."""
    tensors = {n: Header("BF16", s, "") for n, s in expected_tensors(ARCH).items()}
    del tensors[f"{MODULE}.weight"]
    tensors |= {f"{MODULE}.{last}": Header(*told, "") for last, told in made.items()}
    tensors |= {name: Header(*told, "") for name, told in others.items()}
    return Ledger(ARCH, plan_of(ARCH, config, tensors)).survey(tensors)


def headers(make: Callable[[int, int], dict[str, torch.Tensor]]) -> Shapes:
    made = make(ROWS, COLUMNS)
    return {n: (dtype_name(t.dtype), tuple(t.shape)) for n, t in made.items()}


def others() -> list[str]:
    return [n.removesuffix(".weight") for n in expected_tensors(ARCH) if MODULE not in n]


def compressed(form: str, inputs: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": form,
        "config_groups": {
            "group_0": {"targets": [MODULE], "weights": weights, "input_activations": inputs}
        },
    }  # fmt: skip


GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 32, "modules_in_block_to_quantize": [MODULE],
}  # fmt: skip
AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": others(),
}  # fmt: skip
MODELOPT = {"quant_method": "modelopt", "ignore": others()}
FP8 = {"quant_method": "fp8", "modules_to_not_convert": others()}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
BLOCKS = (-(-ROWS // 128), -(-COLUMNS // 128))
INT4 = {"num_bits": 4, "strategy": "group", "group_size": 32}

CASES: dict[str, tuple[dict[str, Any], Shapes]] = {
    "GPTQ": (GPTQ, headers(gptq)),
    "GPTQ, one group": (
        GPTQ | {"group_size": -1},
        headers(gptq) | {"qzeros": ("I32", (1, ROWS // 8)), "scales": ("F16", (1, ROWS))},
    ),
    "GPTQ, three bits": (
        GPTQ | {"bits": 3},
        headers(gptq)
        | {
            "qweight": ("I32", (COLUMNS * 3 // 32, ROWS)),
            "qzeros": ("I32", (COLUMNS // 32, ROWS * 3 // 32)),
        },
    ),
    "AWQ": (AWQ, headers(awq)),
    "NVFP4": (MODELOPT | {"quant_algo": "NVFP4"}, headers(nvfp4)),
    "NVFP4, nested": (
        {"quantization": {"quant_algo": "NVFP4", "group_size": 32, "exclude_modules": others()}},
        headers(nvfp4) | {"weight_scale": ("F8_E4M3", (ROWS, COLUMNS // 32))},
    ),
    "ModelOpt FP8": (
        MODELOPT | {"quant_algo": "FP8"},
        {
            "weight": ("F8_E4M3", (ROWS, COLUMNS)),
            "weight_scale": ("F32", ()),
            "input_scale": ("F32", (1,)),
        },
    ),
    "ModelOpt FP8 by channel": (
        MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        {"weight": ("F8_E4M3", (ROWS, COLUMNS)), "weight_scale": ("F32", (ROWS,))},
    ),
    "ModelOpt FP8 by blocks": (
        MODELOPT | {"quant_algo": "FP8_PB_WO"},
        {
            "weight": ("F8_E4M3", (ROWS, COLUMNS)),
            "weight_scale": ("F32", (BLOCKS[0], 1, BLOCKS[1], 1)),
        },
    ),
    "ModelOpt MXFP8": (
        MODELOPT | {"quant_algo": "MXFP8"},
        {"weight": ("F8_E4M3", (ROWS, COLUMNS)), "weight_scale": ("U8", (ROWS, COLUMNS // 32))},
    ),
    "fp8 by blocks": (FP8 | {"weight_block_size": [128, 128]}, headers(fp8_block)),
    "fp8, static": (
        FP8 | {"activation_scheme": "static"},
        {
            "weight": ("F8_E4M3", (ROWS, COLUMNS)),
            "weight_scale": ("F32", (1,)),
            "input_scale": ("F32", ()),
        },
    ),
    "int4 with zeros": (
        compressed("pack-quantized", symmetric=False, **INT4),
        {
            "weight_packed": ("I32", (ROWS, COLUMNS // 8)),
            "weight_scale": ("BF16", (ROWS, COLUMNS // 32)),
            "weight_zero_point": ("I32", (ROWS // 8, COLUMNS // 32)),
            "weight_shape": ("I64", (2,)),
        },
    ),
    "int4 in the order of the activations": (
        compressed("pack-quantized", actorder="group", **INT4),
        {
            "weight_packed": ("I32", (ROWS, COLUMNS // 8)),
            "weight_scale": ("BF16", (ROWS, COLUMNS // 32)),
            "weight_shape": ("I64", (2,)),
            "weight_g_idx": ("I32", (COLUMNS,)),
        },
    ),
    "int8 by channel": (
        compressed("int-quantized", num_bits=8, strategy="channel"),
        {"weight": ("I8", (ROWS, COLUMNS)), "weight_scale": ("BF16", (ROWS, 1))},
    ),
    "fp8 by tensor": (
        compressed("float-quantized", STATIC, num_bits=8, type="float", strategy="tensor"),
        {
            "weight": ("F8_E4M3", (ROWS, COLUMNS)),
            "weight_scale": ("BF16", (1,)),
            "input_scale": ("BF16", ()),
        },
    ),
    "fp8 by blocks, compressed": (
        compressed(
            "float-quantized", num_bits=8, type="float", strategy="block", block_structure="96x96"
        ),
        {
            "weight": ("F8_E4M3", (ROWS, COLUMNS)),
            "weight_scale": ("BF16", (-(-ROWS // 96), -(-COLUMNS // 96))),
        },
    ),
}  # fmt: skip


def is_clean(report: CheckpointReport) -> bool:
    return report == CheckpointReport()


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_of_another_shape(name: str) -> None:
    """One of each format's tensors at a time, in shapes that a tool or a wrong config may give it."""
    config, made = CASES[name]
    assert is_clean(survey(config, made))
    for last, (dtype, shape) in made.items():
        wrong = [
            (*shape, 2),
            tuple(n + 1 for n in shape) or (2,),
            tuple(n * 2 for n in shape) or (4,),
        ]
        if len(shape) > 1 and shape != shape[::-1]:
            wrong.append(shape[::-1])
        for other in wrong:
            report = survey(config, made | {last: (dtype, other)})
            tensor = f"{MODULE}.{last}"
            assert list(report.wrong_shape) == [tensor], (last, other)
            with pytest.raises(CheckpointError) as caught:
                report.raise_if_bad()
            text = str(caught.value)
            assert f"{tensor} is {list(other)}, not [" in text
            assert str(list(shape)) in text.partition(", not ")[2]
            assert f"of a {[ROWS, COLUMNS]} matrix" in text
            assert "the quantisation config says W" in text


@pytest.mark.parametrize(
    ("name", "last", "shape"),
    [
        ("int8 by channel", "weight_scale", (ROWS,)),
        ("fp8 by tensor", "weight_scale", ()),
        ("fp8 by tensor", "input_scale", (1,)),
        ("ModelOpt FP8", "weight_scale", (1,)),
        ("ModelOpt FP8 by channel", "weight_scale", (ROWS, 1)),
        ("ModelOpt FP8 by blocks", "weight_scale", BLOCKS),
        ("NVFP4", "input_scale", (1,)),
    ],
)
def test_shapes_that_a_format_allows_too(name: str, last: str, shape: tuple[int, ...]) -> None:
    config, made = CASES[name]
    assert made[last][1] != shape
    assert is_clean(survey(config, made | {last: (made[last][0], shape)}))


@pytest.mark.parametrize(
    ("config", "last", "told"),
    [
        (GPTQ | {"group_size": 64}, "scales", f"not [{COLUMNS // 64}, {ROWS}]"),
        (GPTQ | {"bits": 8}, "qweight", f"not [{COLUMNS // 4}, {ROWS}]"),
        (GPTQ | {"group_size": -1}, "qzeros", f"not [1, {ROWS // 8}]"),
    ],
)
def test_a_config_of_another_group_size_or_bits(config: dict[str, Any], last: str, told: str):
    report = survey(config, headers(gptq))
    with pytest.raises(CheckpointError) as caught:
        report.raise_if_bad()
    assert f"{MODULE}.{last} is " in str(caught.value)
    assert told in str(caught.value)


def test_values_of_three_bits_lie_across_the_borders_of_integers_or_not() -> None:
    """compressed-tensors leaves two bits of an integer unused, vLLM's parameters don't: both may be meant."""
    config = compressed("pack-quantized", num_bits=3, strategy="channel")
    rest = {"weight_scale": ("BF16", (ROWS, 1)), "weight_shape": ("I64", (2,))}
    for columns in (-(-COLUMNS // 10), COLUMNS * 3 // 32):
        assert is_clean(survey(config, {"weight_packed": ("I32", (ROWS, columns)), **rest}))
    report = survey(config, {"weight_packed": ("I32", (ROWS, COLUMNS // 8)), **rest})
    assert list(report.wrong_shape) == [f"{MODULE}.weight_packed"]


ATTENTION = f"model.layers.{ARCH.attention_layers[0]}.self_attn"
HEADS, KV_HEADS = ARCH.num_heads, ARCH.num_kv_heads


@pytest.mark.parametrize(
    ("strategy", "scale", "shape", "right"),
    [
        ("tensor", "k_scale", (), True),
        ("tensor", "k_proj.k_scale", (1,), True),
        ("tensor", "k_scale", (KV_HEADS, 1, 1), False),
        ("tensor", "v_scale", (2,), False),
        ("attn_head", "k_scale", (KV_HEADS, 1, 1), True),
        ("attn_head", "v_scale", (KV_HEADS,), True),
        ("attn_head", "q_scale", (HEADS, 1, 1), True),
        ("attn_head", "attn.q_scale", (HEADS, 1, 1), True),
        ("attn_head", "k_scale", (HEADS, 1, 1), False),
        ("attn_head", "q_proj.q_scale", (KV_HEADS, 1, 1), False),
    ],
)
def test_scales_of_a_kv_cache(strategy: str, scale: str, shape: tuple[int, ...], right: bool):
    assert HEADS != KV_HEADS
    config, made = CASES["int8 by channel"]
    config = config | {"kv_cache_scheme": {"num_bits": 8, "strategy": strategy}}
    report = survey(config, made, **{f"{ATTENTION}.{scale}": ("F32", shape)})
    assert is_clean(report) is right
    assert list(report.wrong_shape) == ([] if right else [f"{ATTENTION}.{scale}"])
    assert all("a scale of a KV cache" in told for _, told in report.wrong_shape.values())


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (GPTQ | {"group_size": None}, "group_size is None"),
        (AWQ | {"group_size": 0}, "group_size is 0"),
        (GPTQ | {"bits": 64}, "bits is 64"),
        (MODELOPT | {"quant_algo": "NVFP4", "group_size": "a"}, "group_size is 'a'"),
        (FP8 | {"weight_block_size": [128, 0]}, "weight_block_size"),
        (compressed("int-quantized", strategy="group"), "group_size None"),
        (compressed("int-quantized", strategy="token"), "strategy 'token'"),
        (compressed("int-quantized", strategy="block", block_structure=[128]), "block_structure"),
        (compressed("int-quantized", strategy="block", block_structure="1xa"), "block_structure"),
        (compressed("pack-quantized", num_bits=0, strategy="channel"), "num_bits 0"),
    ],
)
def test_sizes_that_are_none(config: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedQuantisation, match=text):
        read_plan(config, [MODULE])
