"""The demo model over HTTP, as ``lfm2 demo`` serves it: chat, streaming, tool calls, accuracy under load, clients that
leave; and run-batch.
"""

import json
import subprocess

import pytest

from tests.engine_common import example_runs, serving_checks
from tests.engine_common.checkpoints import DEMO
from tests.engine_common.demo_reference import answers, held_out, score
from tests.engine_common.example_runs import kept_demo
from tests.engine_common.openai_http import body, text_of
from tests.engine_vllm.serving import command

pytestmark = pytest.mark.engine

OPTIONS = ["--dtype", "float32", "--max-num-seqs", "64"]
# Under a grammar the demo model would go on with spaces for as long as it may.
COMPACT_GRAMMAR = {"backend": "xgrammar", "disable_any_whitespace": True}
RUN_BATCH = ["--max-model-len", "2048", "--enforce-eager"]
RUN_BATCH += ["--enable-auto-tool-choice", "--tool-call-parser", "lfm2"]
COMPACT = ["--structured-outputs-config", json.dumps(COMPACT_GRAMMAR)]


@pytest.fixture(scope="module")
def demo():
    with kept_demo(*OPTIONS, *COMPACT) as found:
        yield found


@pytest.fixture
def server(demo: tuple[str, str]) -> str:
    return demo[0]


def test_the_demo_answers_right_and_names_our_class(demo: tuple[str, str]):
    example_runs.demo_answers_right(demo[1], "vllm_model.model.Lfm2MoeForCausalLM")


def test_openai_client(server):
    example_runs.openai_client_understands(server)


def test_accuracy_under_64_concurrent_requests(server):
    serving_checks.answers_under_64_concurrent_requests(server)


def test_streamed_answers_are_the_whole_ones(server):
    serving_checks.streamed_answers_are_the_whole_ones(server)


def test_tool_calls(server):
    serving_checks.tool_calls(server)


def test_json_schema(server):
    serving_checks.json_schema(server)


def test_clients_that_leave(server):
    serving_checks.clients_that_leave(
        server, lambda: serving_checks.gauge(server, "vllm:num_requests_running")
    )


@pytest.mark.matrix
def test_run_batch(tmp_path):
    asked = held_out(40)
    lines = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": body(q, model=str(DEMO)),
        }
        for i, q in enumerate(asked)
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    words = ["run-batch", "-i", str(source), "-o", str(target), "--model", str(DEMO)]
    run = subprocess.run(
        command(*words, *OPTIONS, *RUN_BATCH),
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    replies = {r["custom_id"]: r for r in map(json.loads, target.read_text().splitlines())}
    texts = []
    for i in range(len(asked)):
        reply = replies[str(i)]
        assert reply["error"] is None
        texts.append(text_of(reply["response"]["body"]["choices"][0]["message"]))
    assert score(asked, texts) == score(asked, answers(asked))
