"""The demo model over HTTP, as ``lfm2 demo`` serves it: chat, streaming, tool calls, accuracy under load, clients that
leave; once with the Rust server."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.engine_common import example_runs, serving_checks
from tests.engine_common.checkpoints import DEMO
from tests.engine_common.demo_reference import LONGEST_ANSWER, answers, held_out, prompt_ids, score
from tests.engine_common.example_runs import kept_demo
from tests.engine_common.openai_http import ask
from tests.engine_common.references import assert_same, cases
from tests.engine_sglang.releases import needs_rust_templates
from tests.engine_sglang.serving import rendered, served

pytestmark = pytest.mark.engine

OPTIONS = ["--dtype", "float32", "--context-length", "2048"]
# Under a grammar the demo model would go on with spaces for as long as it may.
COMPACT = ["--constrained-json-disable-any-whitespace"]
# The demo model calls tools by names of its own too, and SGLang drops those calls without a word.
KEEP_CALLS = {"SGLANG_FORWARD_UNKNOWN_TOOLS": "1"}
OURS = "sglang_model.model.Lfm2MoeForCausalLM"


@pytest.fixture(scope="module")
def demo():
    many = ["--max-running-requests", "64", "--enable-metrics"]
    with kept_demo(*OPTIONS, *COMPACT, *many, **KEEP_CALLS) as found:
        yield found


@pytest.fixture
def server(demo: tuple[str, str]) -> str:
    return demo[0]


def test_the_demo_answers_right_and_names_our_class(demo: tuple[str, str]):
    example_runs.demo_answers_right(demo[1], OURS)


def test_openai_client(server):
    example_runs.openai_client_understands(server)


def test_accuracy_under_64_concurrent_requests(server):
    serving_checks.answers_under_64_concurrent_requests(server, rendered)


def test_streamed_answers_are_the_whole_ones(server):
    serving_checks.streamed_answers_are_the_whole_ones(server)


def test_tool_calls(server):
    serving_checks.tool_calls(server, rendered)


def test_json_schema(server):
    serving_checks.json_schema(server)


def test_clients_that_leave(server):
    serving_checks.clients_that_leave(
        server, lambda: serving_checks.gauge(server, "sglang:num_running_reqs")
    )


def generate(url: str, **fields) -> dict:
    sent = {"sampling_params": {"temperature": 0, "max_new_tokens": LONGEST_ANSWER}, **fields}
    reply = httpx.post(f"{url}/generate", json=sent, timeout=300)
    assert reply.status_code == 200, reply.text
    return reply.json()


def streamed(url: str, **fields) -> list[dict]:
    """The pieces of a streamed answer, each with all of the text so far."""
    sent = {"sampling_params": {"temperature": 0, "max_new_tokens": LONGEST_ANSWER}, **fields}
    with httpx.stream(
        "POST", f"{url}/generate", json={**sent, "stream": True}, timeout=300
    ) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def native_answers(url: str, count: int) -> None:
    """Texts and tokens go in, alone and as a batch, streamed or not: the answers are transformers'."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    asked = held_out(count)
    ids = [prompt_ids(tokenizer, question) for question in asked]
    texts = [tokenizer.decode(prompt) for prompt in ids]
    keep = {"temperature": 0, "max_new_tokens": LONGEST_ANSWER, "skip_special_tokens": False}
    with ThreadPoolExecutor(count) as pool:
        of_texts = list(
            pool.map(lambda text: generate(url, text=text, sampling_params=keep), texts)
        )
        pieces = list(pool.map(lambda text: streamed(url, text=text, sampling_params=keep), texts))
    of_ids = generate(url, input_ids=ids, sampling_params=keep)
    assert [out["text"] for out in of_texts] == [out["text"] for out in of_ids]
    assert [piece[-1]["text"] for piece in pieces] == [out["text"] for out in of_ids]
    assert any(len(piece) > 4 for piece in pieces)  # it came in pieces
    expected = answers(asked)
    assert score(asked, [out["text"] for out in of_ids]) == score(asked, expected)


def test_native_generate(server):
    native_answers(server, 24)


def test_native_tokens(server):
    asked = cases("demo", 40)
    settings = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    outs = generate(server, input_ids=[c.prompt for c in asked], sampling_params=settings)
    assert_same([{"tokens": out["output_ids"]} for out in outs], asked)


@needs_rust_templates
def test_rust_server(tmp_path):
    """SGLang's server in Rust: no Python between the socket and the scheduler. It has no parser for LFM2's
    tool calls."""
    log = tmp_path / "log"
    with served(DEMO, OPTIONS, log, SGLANG_RUST_SERVER="1") as url:
        assert f"LFM2-MoE is served by {OURS}" in log.read_text()
        asked = [question for question in held_out(40) if question.tools is None]
        assert len(asked) > 24
        with ThreadPoolExecutor(24) as pool:
            texts = list(pool.map(lambda q: ask(url, q), asked))
        assert score(asked, texts) == score(asked, answers(asked))
        native_answers(url, 8)
