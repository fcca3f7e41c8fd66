"""What can be tried without a GPU of the benchmark that needs one: its steps, its comparison, its table."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import short_conv as benchmark
from benchmarks.gpu.short_conv import Case, Row
from tests.kernels.interpreter import Watch

SMALL = [Case("decodes", decodes=3), Case("prompts", prompts=(20, 1)), Case("mixed", 2, (5,))]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "D", 32)


def inputs(case: Case, engine: str | None = None) -> tuple:
    bcx, weight, state = benchmark.make_inputs(case, "cpu", engine)
    return bcx, weight, state, benchmark.make_batch(case, "cpu")


@pytest.mark.parametrize("engine", [None, "sglang"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_steps_are_compared(interpreted, case: Case, engine: str | None) -> None:
    benchmark.compare(case, *inputs(case, engine), None)


def test_another_result_is_noticed(interpreted) -> None:
    case = SMALL[2]

    def other(bcx: torch.Tensor, weight: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return bcx[:, :32] * 0

    with pytest.raises(AssertionError, match=r"mixed: outputs differ|mixed: states differ"):
        benchmark.compare(case, *inputs(case), other)


def test_the_floor_is_what_a_decode_touches(watch: Watch) -> None:
    case = SMALL[0]
    bcx, weight, state, batch = inputs(case)
    out = torch.empty(3, 32, dtype=benchmark.DTYPE)
    benchmark.short_conv_triton(bcx, weight, None, state, batch, out)
    touched = watch.count(bcx, False) + watch.count(out, True)
    touched += watch.count(state, False) + watch.count(state, True)
    assert touched * out.element_size() == case.floor_bytes


def test_table() -> None:
    rows = [Row("a", 10.0, 12.0, 20.0, 36.0, 40.0), Row("b", 1.0, 2.0, 4.0, None, None)]
    lines = benchmark.table(rows, 3e12, "GPU", "sglang").splitlines()
    assert lines[0] == "GPU, copy at 3.00 TB/s; times in microseconds"
    assert "| SGLang, graph | SGLang, eager | SGLang / ours |" in lines[2]
    assert lines[-2] == "| a | 10.0 | 12.0 | 20.0 | 36.0 | 40.0 | 3.00 | 50% |"
    assert lines[-1] == "| b | 1.0 | 2.0 | 4.0 |  |  |  | 25% |"


def test_the_bounds_are_measured() -> None:
    assert {case.tokens for case in benchmark.CASES} >= {1, 1024, 8192}
    assert next(c for c in benchmark.CASES if c.name.startswith("mixed")).sequences == 516
