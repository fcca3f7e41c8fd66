"""The measuring itself: workloads, turns, statistics and processes, with engines that are none."""

import io
import json
import time
from pathlib import Path

import pytest

from benchmarks import engines, report, worker
from benchmarks.driver import Pairs, Side, run_pairs
from benchmarks.sides import side_environment, wrong_class
from benchmarks.workloads import (
    SETS,
    Event,
    Request,
    Sample,
    Workload,
    decode_sample,
    mixed_sample,
    prefill_sample,
    select,
)

EVERY = {w.name: w for workloads in SETS.values() for w in workloads}


class Clockwork:
    """An engine that generates one token of every sequence a step, and takes a fixed time for it."""

    model_class = "vllm.clockwork"
    vocab_size = 1000

    def __init__(self, stepping: bool = True, step_seconds: float = 0.001):
        self.stepping = stepping
        self.step_seconds = step_seconds
        self.left: dict[int, int] = {}
        self.seen: list[Request] = []
        self.count = 0

    def submit(self, requests):
        for request in requests:
            self.left[self.count] = request.max_tokens
            self.count += 1
            self.seen.append(request)

    def step(self):
        time.sleep(self.step_seconds)
        now = time.perf_counter()
        events = []
        for index in list(self.left):
            self.left[index] -= 1
            done = not self.left[index]
            events.append(Event(now, index, 1, done))
            if done:
                del self.left[index]
        return events

    def clear(self):
        self.left.clear()
        self.count = 0


@pytest.mark.parametrize("workload", EVERY.values(), ids=EVERY.keys())
def test_requests_are_the_same_for_both_sides_and_new_every_turn(workload: Workload):
    first, again, second = (workload.requests(turn, 5000) for turn in (1, 1, 2))
    assert first == again
    assert len(first) == (workload.steps if workload.kind == "prefill" else workload.batch)
    assert max(len(r.prompt) for r in first) <= workload.context
    assert min(r.max_tokens for r in first) >= 1
    assert all(16 <= token < 5000 for r in first for token in r.prompt)
    starts = {r.prompt[:4] for r in first}
    assert len(starts) == len(first), "prompts of a turn share a prefix: a cache could answer them"
    assert starts.isdisjoint(r.prompt[:4] for r in second)


def test_mixed_lengths_vary():
    requests = EVERY["mixed 64"].requests(1, 5000)
    assert len({len(r.prompt) for r in requests}) > 40
    assert min(len(r.prompt) for r in requests) < 200 < 800 < max(len(r.prompt) for r in requests)


def test_select():
    assert [w.name for w in select("standard", ["prefill 5"])] == ["prefill 512"]
    assert select("quick") == SETS["quick"]
    with pytest.raises(ValueError, match="unknown set 'fast': choose one of quick"):
        select("fast")
    with pytest.raises(
        ValueError, match=r"no workload of 'quick' matches \['nothing'\]: it has prefill 128"
    ):
        select("quick", ["nothing"])


def test_samples_from_events():
    requests = [Request((1,) * 10, 2), Request((1,) * 30, 2)]
    events = [
        Event(11.0, 0, 1),
        Event(12.0, 1, 1),
        Event(13.0, 0, 1, True),
        Event(14.0, 1, 1, True),
    ]
    assert prefill_sample(requests, 10.0, events[:2]) == Sample(2.0, 40)
    assert mixed_sample(requests, 10.0, events) == Sample(4.0, 44)
    # All decode from 12 (the second's first token) to 13 (the first's end): one token.
    assert decode_sample(2, events) == Sample(1.0, 1)
    with pytest.raises(ValueError, match="ended before all had begun"):
        decode_sample(2, [Event(1.0, 0, 1, True), Event(2.0, 1, 1)])
    with pytest.raises(ValueError, match="ended before all had begun"):
        decode_sample(3, events)


def test_a_rate_is_of_the_median_step():
    assert Sample(10.0, 50).rate == 5.0
    assert Sample(10.0, 30, [1.0, 1.0, 8.0]).rate == 10.0


@pytest.mark.parametrize("workload", SETS["standard"], ids=lambda w: w.name)
@pytest.mark.parametrize("stepping", [True, False])
def test_turns_count_what_they_time(workload: Workload, stepping: bool):
    runner = worker.Runner(Clockwork(stepping))
    runner.prepare(workload, turns=3)
    samples = [runner.turn(number) for number in range(3)]
    runner.finish()
    for number, sample in enumerate(samples):
        if workload.kind == "decode":
            steps = sample.tokens / workload.batch
            assert steps == workload.steps if stepping else steps >= workload.steps
        else:
            requests = workload.requests(number, 1000)
            prompts = sum(len(r.prompt) for r in requests)
            made = sum(r.max_tokens for r in requests) if workload.kind == "mixed" else 0
            assert sample.tokens == prompts + made


def test_decode_sequences_live_through_all_turns():
    engine = Clockwork()
    runner = worker.Runner(engine)
    workload = Workload("decode", "decode", 4, 8, 16)
    runner.prepare(workload, turns=6)
    for number in range(6):
        runner.turn(number)
    assert len(engine.left) == 4
    assert len(engine.seen) == 4


def test_a_turn_needs_a_workload():
    with pytest.raises(RuntimeError, match="prepare a workload first"):
        worker.Runner(Clockwork()).turn(0)


def test_the_worker_answers_line_by_line(monkeypatch, tmp_path):
    monkeypatch.setitem(engines.ENGINES, "clockwork", lambda flags: Clockwork())
    workload = {"name": "w", "kind": "decode", "batch": 2, "context": 4, "steps": 3}
    flags = {"folder": str(tmp_path), "random_weights": True}
    commands = [
        {"op": "start", "engine": "clockwork", "flags": flags},
        {"op": "prepare", "workload": workload, "turns": 1},
        {"op": "turn", "number": 0},
        {"op": "nonsense"},
        {"op": "profile", "number": 0},
        {"op": "finish"},
    ]
    answers = io.StringIO()
    worker.serve(io.StringIO("".join(json.dumps(c) + "\n" for c in commands)), answers)
    start, prepared, turn, nonsense, profile, finished = map(
        json.loads, answers.getvalue().splitlines()
    )
    assert start["result"]["model_class"] == "vllm.clockwork"
    assert prepared == finished == {"result": None}
    assert turn["result"]["tokens"] == 6
    assert len(turn["result"]["steps"]) == 3
    assert "nonsense" in nonsense["error"]
    assert profile["result"]["wall_ms"] > 0


def _side(tmp_path: Path, **options) -> Side:
    return Side("A", "builtin", tmp_path / "a.log", **options)


def test_a_failing_engine_is_reported_with_its_log(tmp_path):
    with (
        _side(tmp_path) as side,
        pytest.raises(
            RuntimeError, match=r"A: start failed:(.|\n)*unknown engine 'steam': choose one of vllm"
        ),
    ):
        side.start("steam", engines.Flags(tmp_path, True))


def test_a_worker_that_ends_is_reported(tmp_path):
    with (
        _side(tmp_path, python="/bin/false") as side,
        pytest.raises(RuntimeError, match=r"the worker (has ended|ended with status 1)"),
    ):
        side.ask("finish")


def test_a_worker_that_hangs_is_stopped(tmp_path):
    script = tmp_path / "hang"
    script.write_text("#!/bin/sh\necho about to hang >&2\nsleep 60\n")
    script.chmod(0o755)
    start = time.monotonic()
    with (
        _side(tmp_path, python=str(script), timeout=0.5) as side,
        pytest.raises(RuntimeError, match=r"no answer within 0 s(.|\n)*about to hang"),
    ):
        side.ask("turn", number=0)
    assert time.monotonic() - start < 30


def test_a_waiting_worker_does_not_spin(tmp_path):
    with _side(tmp_path) as side:
        with pytest.raises(RuntimeError, match="finish failed"):
            side.ask("finish")  # nothing was started, but it is up now
        before = side.cpu_seconds()
        time.sleep(1.0)
        assert side.cpu_seconds() - before < 0.05


class Scripted:
    """A side that writes down what it is asked; its turns last as long as told."""

    def __init__(self, name: str, seconds: float, diary: list):
        self.name, self.seconds, self.diary = name, seconds, diary

    def ask(self, op, **arguments):
        self.diary.append((self.name, op, arguments.get("number")))
        return {"seconds": self.seconds, "tokens": 100} if op == "turn" else None

    def cpu_seconds(self):
        return 0.0


def test_turns_alternate_and_swap_their_order():
    diary: list = []
    ticks: list = []
    workload = Workload("w", "prefill", 1, 8, 1)
    sides = (Scripted("A", 2.0, diary), Scripted("B", 1.0, diary))
    pairs = run_pairs(workload, sides, 3, lambda: ticks.append(1))
    turns = [(name, number) for name, op, number in diary if op == "turn"]
    warm_up, timed = turns[:2], turns[2:]
    assert warm_up == [("A", 0), ("B", 0)]
    assert timed == [("A", 1), ("B", 1), ("B", 2), ("A", 2), ("A", 3), ("B", 3)]
    assert len(ticks) == 8
    assert [name for name, op, _ in diary if op == "finish"] == ["A", "B"]
    assert report.row(pairs).ratio == 2.0


def _pairs(a: list[float], b: list[float]) -> Pairs:
    workload = Workload("decode 1 x 128", "decode", 1, 128, 16)
    return Pairs(workload, [Sample(s, 100) for s in a], [Sample(s, 100) for s in b])


def test_ratios_are_taken_pair_by_pair():
    """A machine that slows down threefold in the middle moves the medians, not the ratio."""
    row = report.row(_pairs([1.0, 3.0, 3.0], [0.5, 1.5, 1.5]))
    assert (row.ratio, row.ratio_min, row.ratio_max, row.b_faster, row.pairs) == (
        2.0,
        2.0,
        2.0,
        3,
        3,
    )
    row = report.row(_pairs([1.0, 1.0, 1.0], [2.0, 0.5, 1.25]))
    assert (row.ratio, row.ratio_min, row.ratio_max, row.b_faster) == (0.8, 0.5, 2.0, 1)


def test_of_several_starts_each_counts_once():
    """One start in which both pairs are slow is one of three, however many pairs it has."""
    starts = _pairs([1.0], [0.5]), _pairs([1.0] * 4, [2.0] * 4), _pairs([1.0, 1.0], [0.8, 0.8])
    row = report.row(*starts)
    assert (row.starts, row.pairs, row.b_faster) == (3, 7, 2)
    assert (row.ratio, row.ratio_min, row.ratio_max) == (1.25, 0.5, 2.0)


def test_cpu_time_is_compared_too():
    """Twice the wall time for half the CPU time: something else was running."""
    pairs = _pairs([1.0], [2.0])
    assert report.row(pairs).cpu_ratio == 0.0
    pairs.a[0].cpu_seconds, pairs.b[0].cpu_seconds = 1.0, 0.5
    row = report.row(pairs)
    assert (row.ratio, row.cpu_ratio) == (0.5, 2.0)


def test_results_are_written(tmp_path):
    pairs = [_pairs([1.0, 1.1], [0.5, 0.6])]
    rows = [report.row(p) for p in pairs]
    report.write_csv(tmp_path / "r.csv", rows)
    header, line = (tmp_path / "r.csv").read_text().splitlines()
    assert header.startswith("workload,kind,batch,context,starts,pairs,a,b,ratio")
    assert line.startswith("decode 1 x 128,decode,1,128,1,2,")
    report.write_json(tmp_path / "r.json", rows, [pairs, pairs], {"commit": "c"})
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["commit"] == "c"
    assert content["samples"][0]["b"][1]["seconds"] == 0.6
    assert [sample["start"] for sample in content["samples"]] == [1, 2]
    report.plot(tmp_path / "r.png", rows, ("builtin", "ours"), "title")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "| decode 1 x 128 | 95.5 | 183.3 | 1.92 | 1.83-2.00 | - |" in report.markdown(
        rows, ("builtin", "ours")
    )


def test_sides_are_told_apart():
    assert side_environment("builtin")["LFM2_PLUGIN"] == "off"
    assert "LFM2_PLUGIN" not in side_environment("ours")
    assert wrong_class("ours", "vllm_model.model.Lfm2MoeForCausalLM") is None
    assert wrong_class("builtin", "vllm.model_executor.models.lfm2_moe.Lfm2MoeForCausalLM") is None
    assert "is lfm2-plugin installed" in wrong_class(
        "ours", "vllm.model_executor.models.lfm2_moe.X"
    )
    assert "did not switch" in wrong_class("builtin", "vllm_model.model.Lfm2MoeForCausalLM")
    with pytest.raises(ValueError, match="unknown side 'theirs'"):
        side_environment("theirs")
