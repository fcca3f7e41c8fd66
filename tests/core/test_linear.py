"""The product with a weight: native against naive, packed against plain, and what packing keeps."""

from __future__ import annotations

import pytest
import torch

from lfm2_plugin.ops.linear import PackedWeight, can_pack, linear, linear_naive, linear_native, pack
from tests.tolerances import assert_within

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# T, N, K
SHAPES = [(0, 8, 16), (1, 1, 1), (1, 33, 17), (3, 64, 96), (8, 100, 7), (65, 48, 128)]


def make_inputs(T: int, N: int, K: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(N)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x = randn(T, K + 3)[:, 1:-2].to(dtype)  # rows with a stride of their own
    return x, (randn(N, K) / K**0.5).to(dtype), randn(N).to(dtype)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_equals_naive(shape: tuple, dtype: torch.dtype, biased: bool) -> None:
    x, weight, bias = make_inputs(*shape, dtype)
    bias = bias if biased else None
    expected = linear_naive(x, weight, bias)
    assert_within("linear", linear_native(x, weight, bias), expected)
    if can_pack(weight):
        assert_within("linear", linear_native(x, PackedWeight.of(weight), bias), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_gives_the_weight_back(shape: tuple, dtype: torch.dtype) -> None:
    _, weight, _ = make_inputs(*shape, dtype)
    packed = pack(weight)
    if not can_pack(weight):
        assert packed is weight
        return
    assert packed.shape == weight.shape
    assert packed.dtype == weight.dtype
    assert torch.equal(packed.unpack(), weight)


def test_float32_can_be_packed_wherever_torch_has_onednn() -> None:
    """So that the tests above don't pass by packing nothing."""
    assert can_pack(torch.zeros(4, 4)) == torch.backends.mkldnn.is_available()


def test_a_weight_of_another_layout_can_be_packed() -> None:
    _, weight, _ = make_inputs(1, 40, 24, torch.float32)
    assert torch.equal(PackedWeight.of(weight.t()).unpack(), weight.t())


def test_the_door_forces_naive(monkeypatch) -> None:
    monkeypatch.setenv("LFM2_PLUGIN_OPS", "naive")
    x, weight, bias = make_inputs(3, 64, 96, torch.float32)
    assert torch.equal(linear(x, pack(weight), bias), linear_naive(x, weight, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"must be \(T, K\) and \(N, K\)"),
        ({"x": torch.zeros(4)}, r"must be \(T, K\) and \(N, K\)"),
        ({"x": torch.zeros(3, 4).bfloat16()}, "they must be alike"),
        ({"bias": torch.zeros(4)}, r"bias must be \(6,\)"),
        ({"bias": torch.zeros(6).bfloat16()}, r"bias must be \(6,\) of torch.float32"),
    ],
    ids=["width", "dims", "dtype", "bias shape", "bias dtype"],
)
def test_refuses(change: dict, message: str) -> None:
    inputs = {"x": torch.zeros(3, 4), "weight": torch.zeros(6, 4), "bias": None}
    with pytest.raises(ValueError, match=message):
        linear(**{**inputs, **change})
