from __future__ import annotations

import pytest
import torch

from lfm2_plugin.ops.linear import PackedWeight, can_pack
from lfm2_plugin.ops.moe import ExpertAdapter, moe, moe_naive, moe_native
from tests.tiny import make_model
from tests.tolerances import HALF_PRECISION_ERROR_RATIO, assert_within

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLEMENTATIONS = {"naive": moe_naive, "native": moe_native}
# T, D, F, E, A
SHAPES = [
    (0, 16, 8, 4, 2),
    (1, 32, 16, 4, 1),
    (1, 33, 17, 8, 4),
    (5, 64, 32, 3, 3),
    (63, 32, 48, 8, 2),
    (40, 48, 32, 32, 4),
]


def make_inputs(T: int, D: int, F: int, E: int, A: int, dtype: torch.dtype) -> tuple:
    generator = torch.Generator().manual_seed(T)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    ids = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :A].int()
    weights = torch.rand(T, A, generator=generator)
    x = randn(T, D + 3)[:, 1:-2].to(dtype)
    w13 = (randn(E, 2 * F, D) / D**0.5).to(dtype)
    return x, w13, (randn(E, D, F) / F**0.5).to(dtype), weights, ids


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_equals_naive(shape: tuple, dtype: torch.dtype) -> None:
    inputs = make_inputs(*shape, dtype)
    expected = moe_naive(*inputs)
    assert_within("moe", moe_native(*inputs), expected)
    x, w13, w2, weights, ids = inputs
    if can_pack(w13):
        packed = [[PackedWeight.of(expert) for expert in stack] for stack in (w13, w2)]
        assert_within("moe", moe(x, *packed, weights, ids), expected)
        assert_within("moe", moe_naive(x, *packed, weights, ids), expected)


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_nobody_is_skipped(run) -> None:
    x, w13, w2, weights, ids = make_inputs(6, 32, 16, 4, 2, torch.float32)
    expected = run(x, w13, w2, weights.masked_fill(ids == 2, 0), ids)
    w13[2] = float("nan")
    ids[ids == 2] = -1
    ids[5] = -1
    x[5] = float("nan")
    out = run(x, w13, w2, weights, ids)
    assert_within("moe", out[:5], expected[:5])
    assert (out[5] == 0).all()


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_a_token_does_not_depend_on_its_neighbours(run) -> None:
    x, w13, w2, weights, ids = make_inputs(40, 48, 32, 32, 4, torch.float32)
    whole = run(x, w13, w2, weights, ids)
    for t in (0, 17, 39):
        one = slice(t, t + 1)
        assert_within("moe", run(x[one], w13, w2, weights[one], ids[one]), whole[one])


def make_factors(E: int, rows: int, columns: int, generator: torch.Generator, shared: str = ""):
    """A (E, 4, columns) and B (E, rows, 4); the factor named by ``shared`` has one expert."""
    a = torch.randn(1 if shared == "A" else E, 4, columns, generator=generator) / columns**0.5
    b = torch.randn(1 if shared == "B" else E, rows, 4, generator=generator)
    return a, b


@pytest.mark.parametrize("shared", ["", "outer"])
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_adapters_equal_merged_weights(run, pairs: int, shared: str) -> None:
    """Two adapters and tokens without one: each token as if its adapter were in the weights."""
    T, D, width, E = 21, 32, 16, 6
    x, w13, w2, weights, ids = make_inputs(T, D, width, E, 3, torch.float32)
    generator = torch.Generator().manual_seed(5)
    uses = torch.arange(T) % 3  # 0: none
    adapters, merged = [], {0: (w13, w2)}
    for number in (1, 2):
        outer = "A" if shared else ""
        up = [make_factors(E, 2 * width // pairs, D, generator, outer) for _ in range(pairs)]
        down = make_factors(E, D, width, generator, "B" if shared else "")
        adapters.append(ExpertAdapter(uses == number, up, [down]))
        full13 = torch.cat([b @ a for a, b in up], dim=1)
        merged[number] = (w13 + full13, w2 + down[1] @ down[0])
    out = run(x, w13, w2, weights, ids, adapters)
    for number, (merged13, merged2) in merged.items():
        mine = uses == number
        expected = moe_naive(x[mine], merged13, merged2, weights[mine], ids[mine])
        assert_within("moe", out[mine], expected)
        if number:
            plain = moe_naive(x[mine], w13, w2, weights[mine], ids[mine])
            assert not torch.allclose(out[mine], plain, atol=0.05)


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_transformers(run, dtype: torch.dtype) -> None:
    """Equal in float32; in half precision no worse than the contract's multiple of its error."""
    block = make_model(num_experts_per_tok=3).model.layers[4].feed_forward
    hidden = torch.randn(30, 128, generator=torch.Generator().manual_seed(2))
    experts = block.experts
    _, weights, ids = block.gate(hidden, block.expert_bias)
    exact = experts(hidden, ids, weights)
    half = experts.to(dtype)
    x, w = hidden.to(dtype), weights.to(dtype)
    theirs = half(x, ids, w)
    ours = run(x, half.gate_up_proj, half.down_proj, w.float(), ids)
    if dtype == torch.float32:
        assert_within("moe", ours, exact)
    else:
        error = (ours.float() - exact).pow(2).mean().sqrt()
        limit = (theirs.float() - exact).pow(2).mean().sqrt() * HALF_PRECISION_ERROR_RATIO
        assert error <= limit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 31)}, r"x \(T, 32\)"),
        ({"x": torch.zeros(3)}, "moe takes x"),
        ({"w13": torch.zeros(4, 16, 32)}, r"needs w13 \(4, 32, 32\)"),
        ({"ids": torch.zeros(3, 1)}, r"weights and ids must both be \(3, A\)"),
        ({"weights": torch.zeros(2, 2), "ids": torch.zeros(2, 2)}, r"must both be \(3, A\)"),
        ({"w2": torch.zeros(4, 32, 16).bfloat16()}, "they must be alike"),
    ],
    ids=["width", "dims", "w13", "ids", "rows", "dtype"],
)
def test_refuses(change: dict, message: str) -> None:
    names = ("x", "w13", "w2", "weights", "ids")
    inputs = dict(zip(names, make_inputs(3, 32, 16, 4, 2, torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        moe(**{**inputs, **change})
