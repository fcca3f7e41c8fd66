"""The demo model's questions over a server's OpenAI interface."""

import json

import httpx

from lfm2_plugin.cli.demo import NAME
from lfm2_plugin.demo.tasks import Question, call_text
from tests.engine_common.demo_reference import LONGEST_ANSWER


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
    values = {"model": NAME, "messages": messages, "temperature": 0}
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


def ask(url: str, question: Question, **fields) -> str:
    reply = httpx.post(f"{url}/v1/chat/completions", json=body(question, **fields), timeout=300)
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
