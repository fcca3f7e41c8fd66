"""What a server of the demo model has to do over HTTP, whatever the engine behind it."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import torch

from lfm2_plugin.demo.tasks import CALL_START, Question, questions
from tests.engine_common.demo_reference import answers, held_out, score
from tests.engine_common.openai_http import ask, body, joined, stream

QUESTIONS = 500
Rendered = Callable[[Question], Question]


def as_asked(question: Question) -> Question:
    """A server that puts into the prompt what the client sent, and no more."""
    return question


def answers_under_64_concurrent_requests(
    url: str,
    rendered: Rendered = as_asked,
    dtype: torch.dtype = torch.float32,
) -> None:
    """As many right answers as transformers, within one of 500.

    In bfloat16 some answers hang on how a sum is rounded, which differs from CPU to CPU; transformers itself has 376
    right in float32 and 374 in bfloat16. A server in bfloat16 may lie between the two, or one beside.

    Args:
        url: of the server.
        rendered: what the server makes of a question before it comes to the chat template.
        dtype: of the server.
    """
    asked = held_out(QUESTIONS)
    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(lambda q: ask(url, q), asked))
    ours = score(asked, texts)
    put = [rendered(q) for q in asked]
    theirs = [score(asked, answers(put))]
    assert theirs[0] > QUESTIONS / 2  # the model knows its tasks, so a broken state would show
    slack = QUESTIONS // 500
    if dtype != torch.float32 and abs(ours - theirs[0]) > slack:  # else no need to compute it
        theirs.append(score(asked, answers(put, dtype)))
    assert min(theirs) - slack <= ours <= max(theirs) + slack


def streamed_answers_are_the_whole_ones(url: str) -> None:
    asked = questions(seed=31, n=16)
    with ThreadPoolExecutor(16) as pool:
        whole = list(pool.map(lambda q: ask(url, q), asked))
        streamed = list(pool.map(lambda q: stream(url, q), asked))
    assert [joined(deltas) for deltas, _ in streamed] == whole
    assert all(usage["completion_tokens"] > 0 for _, usage in streamed)
    assert any(len(deltas) > 4 for deltas, _ in streamed)  # it came in pieces


def tool_calls(url: str, rendered: Rendered = as_asked) -> None:
    """The parser finds name and arguments of what transformers writes, in one piece and streamed."""
    asked = questions(seed=32, n=24, task="tool_call")
    with ThreadPoolExecutor(24) as pool:
        whole = list(pool.map(lambda q: ask(url, q), asked))
        streamed = [joined(deltas) for deltas, _ in pool.map(lambda q: stream(url, q), asked)]
    assert streamed == whole
    expected = answers([rendered(q) for q in asked])
    theirs = [replace(q, answer=text) for q, text in zip(asked, expected, strict=True)]
    assert all(CALL_START in q.answer for q in theirs)
    assert score(theirs, whole) == len(asked)
    assert all(text.startswith(CALL_START) for text in whole)  # so it was the parser's


def json_schema(url: str) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "string", "enum": ["yes", "no"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    sent = body(questions(seed=33, n=1)[0], response_format=form)
    reply = httpx.post(f"{url}/v1/chat/completions", json=sent, timeout=300).json()
    choice = reply["choices"][0]
    assert choice["finish_reason"] == "stop", reply
    assert json.loads(choice["message"]["content"])["answer"] in ("yes", "no")


def clients_that_leave(url: str, running: Callable[[], float]) -> None:
    """Thirty-two streams dropped after two pieces: nothing keeps running, the next answers are right.

    Args:
        running: how many requests the server says that it runs.
    """
    asked = questions(seed=34, n=32, task="count_up")
    expected = answers(asked)
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda q: stream(url, q, leave_after=2), asked))
        deadline = time.monotonic() + 20
        while running() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert running() == 0
        texts = list(pool.map(lambda q: ask(url, q), asked))
    assert score(asked, texts) == score(asked, expected)


def gauge(url: str, name: str) -> float:
    """A figure of the server's metrics, summed over its labels."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith(f"{name}{{"))
