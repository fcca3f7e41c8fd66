from __future__ import annotations

import pytest
import torch

from lfm2_plugin.ops.router import route, route_naive, route_native
from tests.tiny import make_model
from tests.tolerances import assert_within

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 4, 2), (1, 1, 1), (1, 8, 2), (7, 32, 4), (33, 64, 4), (5, 6, 6)]
IMPLEMENTATIONS = {"naive": route_naive, "native": route_native}


def make_logits(T: int, E: int, dtype: torch.dtype, seed: int = 0) -> tuple:
    """Logits (T, E), and a bias that changes the choice in many rows."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=generator).to(dtype)
    return logits, torch.randn(E, generator=generator) * 0.3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("renormalise", [True, False], ids=["renormalised", "as-is"])
@pytest.mark.parametrize(("T", "E", "A"), SHAPES)
def test_native_equals_naive(T, E, A, renormalise, with_bias, dtype) -> None:
    logits, bias = make_logits(T, E, dtype)
    expert_bias = bias if with_bias else None
    padding = torch.arange(T) % 3 == 2
    weights, ids = route_native(logits, expert_bias, A, renormalise, 1.5, padding)
    expected, expected_ids = route_naive(logits, expert_bias, A, renormalise, 1.5, padding)
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int32
    # Equal rankings may come in either order: compare what was chosen, by expert.
    ranking = logits.sigmoid() + (0 if expert_bias is None else expert_bias)
    taken = torch.where(ids < 0, -1, ranking.gather(1, ids.clamp(min=0).long()))
    wanted = torch.where(expected_ids < 0, -1, ranking.gather(1, expected_ids.clamp(min=0).long()))
    assert torch.equal(taken, wanted)
    untied = (ids == expected_ids).all(dim=1)
    assert untied.sum() >= 0.8 * T
    assert_within("router", weights[untied].to(dtype), expected[untied].to(dtype))


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("norm", [True, False], ids=["renormalised", "as-is"])
def test_equals_transformers(run, bias: bool, norm: bool) -> None:
    model = make_model(
        use_expert_bias=bias, norm_topk_prob=norm, num_experts_per_tok=3, routed_scaling_factor=1.5
    )
    block = model.model.layers[3].feed_forward
    hidden = torch.randn(50, 128, generator=torch.Generator().manual_seed(1))
    expert_bias = block.expert_bias if bias else None
    logits, expected, expected_ids = block.gate(hidden, expert_bias)
    weights, ids = run(logits, expert_bias, 3, norm, 1.5, None)
    assert torch.equal(ids.long(), expected_ids)
    assert_within("router", weights, expected)


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_bias_chooses_and_does_not_weigh(run) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    weights, ids = run(logits, torch.tensor([0.0, 0.0, 0.0, 9.0]), 2, False, 1.0, None)
    assert ids.tolist() == [[3, 0]]
    assert_within("router", weights, logits.sigmoid()[:, [3, 0]])


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_epsilon_is_the_reference_s(run) -> None:
    """With scores as small as the epsilon, 1e-6 and 1e-20 are far apart."""
    logits = torch.logit(torch.tensor([[1e-6, 5e-7, 1e-8]], dtype=torch.float64)).float()
    weights, _ = run(logits, None, 2, True, 1.0, None)
    assert_within("router", weights.sum(), torch.tensor(1.5 / 2.5))


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_padding_chooses_nobody(run) -> None:
    logits = torch.full((3, 4), float("nan"))
    logits[1] = torch.tensor([0.0, 3.0, 1.0, 2.0])
    weights, ids = run(logits, None, 2, True, 1.0, torch.tensor([True, False, True]))
    assert ids.tolist() == [[-1, -1], [1, 3], [-1, -1]]
    assert (weights[[0, 2]] == 0).all()


def test_compiles_whole() -> None:
    """An engine traces the router with its own graph: no break, no recompilation per batch size."""
    logits, bias = make_logits(6, 8, torch.float32)
    padding = torch.arange(6) > 3

    def choose(logits, bias, padding):
        return route(logits, bias, 2, renormalise=True, scaling=2.0, padding=padding)

    compiled = torch.compile(choose, fullgraph=True, dynamic=True, backend="eager")
    for rows in (6, 5):
        args = (logits[:rows], bias, padding[:rows])
        for got, expected in zip(compiled(*args), choose(*args), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("shapes", "top_k", "message"),
    [
        (((3, 4), None, None), 5, "cannot choose 5 experts"),
        (((3, 4), None, None), 0, "cannot choose 0 experts"),
        (((3,), None, None), 1, "cannot choose 1 experts"),
        (((3, 4), (3,), None), 2, r"expert_bias must be \(4,\)"),
        (((3, 4), (4,), (4,)), 2, r"padding must be \(3,\)"),
    ],
)
def test_refuses(shapes, top_k: int, message: str) -> None:
    logits, bias, padding = (None if s is None else torch.zeros(s) for s in shapes)
    with pytest.raises(ValueError, match=message):
        route(logits, bias, top_k, renormalise=True, padding=padding)
