"""The demo model over HTTP: chat, streaming, tool calls, accuracy under load, clients that leave; and
run-batch."""

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
from checkpoints import DEMO
from demo_reference import LONGEST_ANSWER, answers, held_out, score
from serving import command, served

from lfm2_plugin.demo.tasks import CALL_START, Question, call_text, questions

pytestmark = pytest.mark.engine

OPTIONS = ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "64"]
# Under a grammar the demo model would go on with spaces for as long as it may.
COMPACT_GRAMMAR = {"backend": "xgrammar", "disable_any_whitespace": True}
COMPACT = ["--structured-outputs-config", json.dumps(COMPACT_GRAMMAR)]
TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "lfm2"]
QUESTIONS = 500
OURS = "LFM2-MoE is served by vllm_model.model.Lfm2MoeForCausalLM"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "log"
    with served(DEMO, [*OPTIONS, *TOOLS, *COMPACT], log) as url:
        assert OURS in log.read_text()
        yield url


def on_the_wire(message: dict) -> dict:
    """A message in the OpenAI form: calls have an id, and their arguments are JSON text."""
    if message["role"] == "tool":
        return {**message, "tool_call_id": "call"}
    calls = [
        {
            "type": "function",
            "id": "call",
            "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])},
        }
        for c in message.get("tool_calls") or []
    ]
    return {**message, "tool_calls": calls} if calls else message


def body(question: Question, **fields) -> dict:
    messages = [on_the_wire(message) for message in question.messages]
    values = {"model": "model", "messages": messages, "temperature": 0}
    if question.tools is not None:
        values["tools"] = question.tools
    return {**values, "max_completion_tokens": LONGEST_ANSWER, **fields}


def text_of(message: dict) -> str:
    """The answer as the tasks write it: text, or a tool call between its markers."""
    calls = message.get("tool_calls") or []
    if not calls:
        return message["content"] or ""
    function = calls[0]["function"]
    return call_text(function["name"], json.loads(function["arguments"]))


def ask(url: str, question: Question) -> str:
    reply = httpx.post(f"{url}/v1/chat/completions", json=body(question), timeout=300)
    assert reply.status_code == 200, reply.text
    return text_of(reply.json()["choices"][0]["message"])


def stream(url: str, question: Question, leave_after: int | None = None) -> tuple[list[dict], dict]:
    """The deltas of a streamed answer, and the last chunk's usage."""
    sent = body(question, stream=True, stream_options={"include_usage": True})
    deltas, usage = [], {}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=sent, timeout=300) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            deltas += [choice["delta"] for choice in chunk["choices"]]
            usage = chunk.get("usage") or usage
            if leave_after is not None and len(deltas) >= leave_after:
                break
    return deltas, usage


def joined(deltas: list[dict]) -> str:
    """A streamed answer put together."""
    name, arguments = "", ""
    for delta in deltas:
        for call in delta.get("tool_calls") or []:
            name += call["function"].get("name") or ""
            arguments += call["function"].get("arguments") or ""
    if name:
        return call_text(name, json.loads(arguments))
    return "".join(delta.get("content") or "" for delta in deltas)


def test_accuracy_under_64_concurrent_requests(server):
    asked = held_out(QUESTIONS)
    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(lambda q: ask(server, q), asked))
    ours, theirs = score(asked, texts), score(asked, answers(asked))
    assert theirs > QUESTIONS / 2  # the model knows its tasks, so a broken state would show
    assert abs(ours - theirs) <= QUESTIONS // 500


def test_streamed_answers_are_the_whole_ones(server):
    asked = questions(seed=31, n=16)
    with ThreadPoolExecutor(16) as pool:
        whole = list(pool.map(lambda q: ask(server, q), asked))
        streamed = list(pool.map(lambda q: stream(server, q), asked))
    assert [joined(deltas) for deltas, _ in streamed] == whole
    assert all(usage["completion_tokens"] > 0 for _, usage in streamed)
    assert any(len(deltas) > 4 for deltas, _ in streamed)  # it came in pieces


def test_tool_calls(server):
    """The parser finds name and arguments of what transformers writes, in one piece and streamed."""
    asked = questions(seed=32, n=24, task="tool_call")
    with ThreadPoolExecutor(24) as pool:
        whole = list(pool.map(lambda q: ask(server, q), asked))
        streamed = [joined(deltas) for deltas, _ in pool.map(lambda q: stream(server, q), asked)]
    assert streamed == whole
    theirs = [replace(q, answer=text) for q, text in zip(asked, answers(asked), strict=True)]
    assert all(CALL_START in q.answer for q in theirs)
    assert score(theirs, whole) == len(asked)
    assert all(text.startswith(CALL_START) for text in whole)  # so it was the parser's


def test_json_schema(server):
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "string", "enum": ["yes", "no"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    sent = body(questions(seed=33, n=1)[0], response_format=form)
    reply = httpx.post(f"{server}/v1/chat/completions", json=sent, timeout=300).json()
    choice = reply["choices"][0]
    assert choice["finish_reason"] == "stop", reply
    assert json.loads(choice["message"]["content"])["answer"] in ("yes", "no")


def gauge(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith(f"{name}{{"))


def test_clients_that_leave(server):
    """Thirty-two streams dropped after two pieces: nothing keeps running, the next answers are right."""
    asked = questions(seed=34, n=32, task="count_up")
    expected = answers(asked)
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda q: stream(server, q, leave_after=2), asked))
        deadline = time.monotonic() + 20
        while gauge(server, "vllm:num_requests_running") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert gauge(server, "vllm:num_requests_running") == 0
        texts = list(pool.map(lambda q: ask(server, q), asked))
    assert score(asked, texts) == score(asked, expected)


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
        command(*words, *OPTIONS, *TOOLS, "--enforce-eager"),
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
