"""The router's Triton kernel against its naive twin, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from lfm2_plugin.ops.router import route_naive
from lfm2_plugin.ops.router.triton import TOKENS, route_triton
from tests.kernels.interpreter import Watch
from tests.tiers import matrix
from tests.tolerances import assert_within

DTYPES = [matrix(torch.float32), torch.bfloat16, matrix(torch.float16)]
SHAPES = [(0, 4, 2), (1, 1, 1), (1, 8, 2), (5, 6, 6), (TOKENS, 16, 4), (TOKENS + 1, 32, 4)]
SHAPES += [(33, 64, 4), (20, 128, 8), (9, 33, 5)]


def make_logits(T: int, E: int, dtype: torch.dtype, device: str) -> tuple:
    """Logits (T, E), and a bias that changes the choice in many rows."""
    generator = torch.Generator().manual_seed(T + E)
    logits = torch.randn(T, E, generator=generator).to(dtype)
    return logits.to(device), (torch.randn(E, generator=generator) * 0.3).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("renormalise", [True, False], ids=["renormalised", "as-is"])
@pytest.mark.parametrize(("T", "E", "A"), SHAPES)
def test_triton_equals_naive(device, T, E, A, renormalise, with_bias, dtype) -> None:
    logits, bias = make_logits(T, E, dtype, device)
    expert_bias = bias if with_bias else None
    padding = torch.arange(T, device=device) % 3 == 2
    weights, ids = route_triton(logits, expert_bias, A, renormalise, 1.5, padding)
    expected, expected_ids = route_naive(logits, expert_bias, A, renormalise, 1.5, padding)
    assert weights.dtype == torch.float32
    # Both take the first of equal rankings. A sigmoid that differs in its last place may move a ranking, so what was
    # chosen is compared by its rank.
    ranking = logits.sigmoid() + (0 if expert_bias is None else expert_bias)
    taken = torch.where(ids < 0, -1, ranking.gather(1, ids.clamp(min=0).long()))
    wanted = torch.where(expected_ids < 0, -1, ranking.gather(1, expected_ids.clamp(min=0).long()))
    torch.testing.assert_close(
        taken.float(), wanted.float(), rtol=0, atol=2 * torch.finfo(dtype).eps
    )
    same = (ids == expected_ids).all(dim=1)
    assert same.sum() >= 0.9 * T
    assert_within("router", weights[same].to(dtype), expected[same].to(dtype))


def test_the_first_of_equals(device) -> None:
    logits = torch.zeros(3, 8, device=device)
    weights, ids = route_triton(logits, None, 3, True, 1.0, None)
    assert ids.tolist() == [[0, 1, 2]] * 3
    assert_within("router", weights, torch.full_like(weights, 0.5 / 1.500001))


def test_bias_chooses_and_does_not_weigh(device) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], device=device)
    bias = torch.tensor([0.0, 0.0, 0.0, 9.0], device=device)
    weights, ids = route_triton(logits, bias, 2, False, 1.0, None)
    assert ids.tolist() == [[3, 0]]
    assert_within("router", weights, logits.sigmoid()[:, [3, 0]])


def test_epsilon_is_the_reference_s(device) -> None:
    """With scores as small as the epsilon, 1e-6 and 1e-20 are far apart."""
    logits = torch.logit(torch.tensor([[1e-6, 5e-7, 1e-8]], dtype=torch.float64)).float()
    weights, _ = route_triton(logits.to(device), None, 2, True, 1.0, None)
    assert_within("router", weights.sum().cpu(), torch.tensor(1.5 / 2.5))


def test_padding_chooses_nobody(device) -> None:
    logits = torch.full((3, 4), float("nan"), device=device)
    logits[1] = torch.tensor([0.0, 3.0, 1.0, 2.0])
    padding = torch.tensor([True, False, True], device=device)
    weights, ids = route_triton(logits, None, 2, True, 1.0, padding)
    assert ids.tolist() == [[-1, -1], [1, 3], [-1, -1]]
    assert (weights[[0, 2]] == 0).all()


def test_a_broken_token_names_experts_that_exist(device) -> None:
    logits = torch.full((2, 6), float("nan"), device=device)
    logits[1, 2:] = torch.tensor([0.0, 1.0, float("inf"), float("-inf")])
    _, ids = route_triton(logits, None, 4, True, 1.0, None)
    assert ids.tolist()[0] == [0, 1, 2, 3]
    assert sorted(ids.tolist()[1][:2]) == [0, 1]
    assert len(set(ids.tolist()[1])) == 4
    assert max(max(row) for row in ids.tolist()) < 6


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_ids_in_the_dtype_that_the_experts_want(device, ids_dtype) -> None:
    logits, bias = make_logits(5, 8, torch.float32, device)
    _, ids = route_triton(logits, bias, 2, True, 1.0, None, ids_dtype)
    _, expected = route_naive(logits, bias, 2, True, 1.0, None)
    assert ids.dtype == ids_dtype
    assert torch.equal(ids.int(), expected)


def test_logits_with_strides(device) -> None:
    logits, bias = make_logits(9, 32, torch.float32, device)
    expected = route_triton(logits, bias, 4, True, 1.0, None)
    wide = torch.full((9, 64), float("nan"), device=device)
    for view in (wide[:, 3:35], wide[:, ::2]):
        view.copy_(logits)
        for got, want in zip(route_triton(view, bias, 4, True, 1.0, None), expected, strict=True):
            assert torch.equal(got, want)


def test_each_logit_is_read_once(watch: Watch) -> None:
    logits, bias = make_logits(TOKENS + 3, 32, torch.bfloat16, "cpu")
    weights, ids = route_triton(logits, bias, 4, True, 1.0, None)
    assert watch.count(logits, stores=False) == logits.numel()
    assert watch.count(weights, stores=True) == weights.numel()
    assert watch.count(ids, stores=True) == ids.numel()
