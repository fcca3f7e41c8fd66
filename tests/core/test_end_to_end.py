"""What can be tried without a GPU of the end-to-end benchmark: its turns, its file, its table, its models."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.engines import Flags
from benchmarks.gpu import end_to_end
from benchmarks.models import RIVALS, model_folder
from benchmarks.workloads import SETS

FACTS = {"model": "24b", "device": "X", "engine_arguments": {"max_num_seqs": 1024}, "ops": "auto"}


class Scripted:
    """A side whose every turn works through 100 tokens in half a second."""

    model_class = "vllm_model.model.Lfm2MoeForCausalLM"

    def __init__(self):
        self.asked = []

    def start(self, engine, flags):
        return 60.0

    def ask(self, op, **arguments):
        self.asked.append((op, arguments.get("workload", {}).get("name", arguments.get("number"))))
        return {"seconds": 0.5, "tokens": 100} if op == "turn" else None


def test_a_side_is_warmed_up_and_each_workload_measured():
    side, workloads = Scripted(), SETS["serving"][:2]
    found = end_to_end.measure(side, Flags(Path("m"), True), workloads, turns=2)
    assert found["tokens_per_second"] == {w.name: [200.0, 200.0] for w in workloads}
    assert found["class"] == side.model_class
    assert [name for op, name in side.asked if op == "prepare"] == [
        "warm-up",
        *[w.name for w in workloads],
    ]


def test_the_workloads_are_the_releases():
    wanted = {(n, 1024, 512) for n in (64, 256, 1024)}
    uniform = [w for w in SETS["serving"] if w.kind == "uniform"]
    assert {(w.batch, w.context, w.steps) for w in uniform} == wanted
    requests = uniform[0].requests(0, 5000)
    assert {(len(r.prompt), r.max_tokens) for r in requests} == {(1024, 512)}
    assert len(requests) == 64


def run_of(side: str, rate: float) -> dict:
    return {"side": side, "tokens_per_second": {"64 at once": [rate]}}


def test_runs_are_added_and_their_medians_shown(tmp_path):
    path = tmp_path / "gpu" / "name.json"
    for side, rate in (("builtin", 100), ("ours", 150), ("builtin", 120), ("builtin", 90)):
        runs = end_to_end.add_run(path, FACTS, run_of(side, rate))
    assert len(json.loads(path.read_text())["runs"]) == 4
    last = end_to_end.table(runs, "X").splitlines()[-1]
    assert last == "| 64 at once | 100 | 150 | 1.50 | 3 + 1 |"
    alone = end_to_end.table(runs[:1], "X").splitlines()[-1]
    assert alone == "| 64 at once | 100 |  |  | 1 + 0 |"


@pytest.mark.parametrize("key", FACTS)
def test_runs_of_something_else_are_not_mixed_in(tmp_path, key):
    path = tmp_path / "name.json"
    end_to_end.add_run(path, FACTS, run_of("ours", 1))
    with pytest.raises(ValueError, match=f"holds runs with {key}=.* give another --name"):
        end_to_end.add_run(path, FACTS | {key: "other"}, run_of("ours", 1))
    assert len(json.loads(path.read_text())["runs"]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_clear_line(capsys):
    assert end_to_end.main(["--model", "8b"]) == 1
    assert capsys.readouterr().err.strip() == "error: this needs a GPU that nvidia-smi lists"


@pytest.mark.parametrize(("name", "billions"), [("qwen3-30b-a3b", 30.5), ("gpt-oss-20b", 20.9)])
def test_the_rivals_have_their_published_sizes(tmp_path, name, billions):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, real = model_folder(name, tmp_path)
    assert not real
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == RIVALS[name]["architectures"]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.05)
