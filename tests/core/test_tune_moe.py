"""What can be tried without a GPU of the tuner of expert kernels: its search, its file, its taking up again."""

import json
import math

import pytest

from benchmarks.gpu import tune_moe
from benchmarks.gpu.tune_moe import AXES, Shape, Tuned, descend, on_the_axes, shape_of, tune

SHAPE = Shape(32, 1792, 2048, 4)
GUESS = {axis: values[0] for axis, values in AXES.items()}
BEST = {
    "BLOCK_SIZE_M": 64,
    "BLOCK_SIZE_N": 256,
    "BLOCK_SIZE_K": 32,
    "GROUP_SIZE_M": 8,
    "num_warps": 8,
    "num_stages": 4,
}


def bowl(config: dict[str, int]) -> float:
    """Seconds that grow with the distance from BEST along each axis."""
    return 1e-4 * math.prod(
        1.3 ** abs(values.index(config[axis]) - values.index(BEST[axis]))
        for axis, values in AXES.items()
    )


def test_shapes_are_those_of_the_published_models():
    assert shape_of("8b", 1) == SHAPE
    assert shape_of("24b", 4) == Shape(64, 384, 2048, 4)
    with pytest.raises(ValueError, match="experts of width 1792 can't be divided over 3 ranks"):
        shape_of("8b", 3)


@pytest.mark.parametrize("start", [GUESS, {axis: values[-1] for axis, values in AXES.items()}])
def test_the_best_is_found_from_either_side(start):
    measured = []
    best, seconds, tried = descend(start, lambda config: measured.append(config) or bowl(config))
    assert best == BEST
    assert seconds == bowl(BEST)
    assert tried == len(measured) < 60  # of 2,400


def test_what_can_not_run_or_gains_too_little_is_passed_by():
    def measure(config):
        if config["BLOCK_SIZE_N"] == 64:
            return math.inf
        return 1.0 if config == GUESS else 0.99

    assert descend(GUESS, measure)[:2] == (GUESS, 1.0)


def test_the_engines_guess_gets_every_axis():
    guess = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1}
    assert on_the_axes(guess | {"SPLIT_K": 1}) == guess | {"num_warps": 4, "num_stages": 3}


def test_a_run_is_taken_up_where_it_stopped(tmp_path, monkeypatch):
    path = tmp_path / "moe" / "E=32,N=1792,device_name=X.json"
    monkeypatch.setattr(tune_moe, "TOKENS", (1, 2, 4))
    benched, said = [], []

    def bench(tokens):
        if len(benched) == 2:
            raise KeyboardInterrupt
        benched.append(tokens)
        return GUESS, bowl

    with pytest.raises(KeyboardInterrupt):
        tune(SHAPE, path, bench, "3.6.0", 60, said.append)
    assert json.loads(path.read_text()) == {"triton_version": "3.6.0", "1": BEST, "2": BEST}
    benched.clear()
    found = tune(SHAPE, path, bench, "3.6.0", 60, said.append)
    assert benched == [4]
    assert [row.tokens for row in found] == [4]
    assert set(json.loads(path.read_text())) == {"triton_version", "1", "2", "4"}
    assert "| 4 |" in tune_moe.table(SHAPE, found, "X")
    assert tune(SHAPE, path, bench, "3.6.0", 60, said.append) == []


def test_nothing_is_begun_when_time_is_up(tmp_path):
    said = []
    path = tmp_path / "file.json"
    assert tune(SHAPE, path, lambda tokens: (GUESS, bowl), "3.6.0", -1, said.append) == []
    assert "14 numbers of tokens are left" in said[0]
    assert not path.exists()


def test_table():
    row = Tuned(8, 100.0, 80.0, 30, BEST)
    assert tune_moe.table(SHAPE, [row], "X").splitlines()[-1] == "| 8 | 100.0 | 80.0 | 1.25 |"
