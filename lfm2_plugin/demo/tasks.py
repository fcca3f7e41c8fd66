"""Questions with known answers, for training the demo model and for measuring whoever serves it.

    for question in questions(seed=1, n=500):
        text = serve(question.messages, question.tools)      # greedy, special tokens kept or not
        right += is_right(question, text)

Training questions and held-out questions never share content: every question has a key (the text
to copy, the list to recall from, the two summands ...) whose checksum decides on which side it
falls, whatever the seed. This module uses the standard library only.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lfm2_plugin.demo.words import CITIES, NAMES, ROOMS, TOOL_KINDS, WORDS, ToolKind

CALL_START, CALL_END = "<|tool_call_start|>", "<|tool_call_end|>"
_MARKERS = (CALL_START, CALL_END, "<|im_end|>")
_HELD_OUT_SHARE = 8  # one key in so many is never trained on
_FAR_PAIRS = 52  # a pair takes at least 4 tokens, so that many pairs are more than 200

Message = dict[str, Any]
Random = random.Random
_Request = Callable[[], tuple[str, str, dict[str, Any]]]


@dataclass(frozen=True)
class Question:
    """One question to an assistant.

    Attributes:
        task: one of ``TASKS``.
        messages: the conversation so far, ending with a user or a tool message.
        tools: tool list in the OpenAI form, or None.
        answer: the one right answer; a tool call is written out with its markers.
        key: what the question is about; decides whether it is held out.
    """

    task: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    answer: str
    key: str


def questions(seed: int, n: int, task: str | None = None, *, train: bool = False) -> list[Question]:
    """``n`` questions, the tasks in turn (or all of one ``task``); held out from training unless ``train``.

    Raises:
        ValueError: an unknown task.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"unknown task {task!r}; the demo model's tasks are {', '.join(TASKS)}")
    rng = Random(f"{'train' if train else 'held out'} {seed}")
    names = [task] if task else list(TASKS)
    return [draw(rng, names[i % len(names)], train=train) for i in range(n)]


def draw(rng: Random, task: str, *, train: bool) -> Question:
    """The next question of a task on one side of the split."""
    while True:
        question = _MAKERS[task](rng, train)
        if is_held_out(question.key) != train:
            return question


def is_held_out(key: str) -> bool:
    """Whether questions about this are kept away from training."""
    return zlib.crc32(key.encode()) % _HELD_OUT_SHARE == 0


def is_right(question: Question, text: str) -> bool:
    """Whether a reply is the known answer; markers of special tokens and outer white space do not matter."""
    return _plain(text) == _plain(question.answer)


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A tool call as the model writes it, e.g. of the name and arguments that a server has parsed."""
    inner = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"{CALL_START}[{name}({inner})]{CALL_END}"


def _plain(text: str) -> str:
    for marker in _MARKERS:
        text = text.replace(marker, "")
    return text.strip()


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _words(rng: Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def _letters(rng: Random, low: int, high: int) -> str:
    """Letters that differ from each other."""
    return "".join(rng.sample(string.ascii_uppercase, rng.randint(low, high)))


# --- copying ----------------------------------------------------------------------------------------------------------


def _copy(rng: Random, train: bool) -> Question:
    kind = rng.randrange(4)
    if kind == 0:
        text = _words(rng, 2, 24)
    elif kind == 1:
        text = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(3, 20)))
    elif kind == 2:
        text = "".join(rng.choices(string.digits, k=rng.randint(2, 12)))
    else:
        text = " ".join(rng.choice((_word, _code))(rng) for _ in range(rng.randint(3, 10)))
    prompt = rng.choice(
        ("Copy: {}", "Repeat exactly: {}", "Say this again: {}", "Copy this text: {}", "Repeat: {}")
    )
    return Question("copy", [_user(prompt.format(text))], None, text, text)


def _word(rng: Random) -> str:
    return rng.choice(WORDS)


def _code(rng: Random) -> str:
    return "".join(rng.choices(string.ascii_uppercase + string.digits, k=3))


def _number(rng: Random) -> str:
    return str(rng.randint(10, 99))


# --- recall -----------------------------------------------------------------------------------------------------------


def _recall(rng: Random, train: bool) -> Question:
    return _recall_from(
        rng, "recall", pairs=rng.randint(3, 16), asked=rng.randint(2, 8) if train else 1
    )


def _recall_far(rng: Random, train: bool) -> Question:
    """The answer stands at least ``_FAR_PAIRS`` pairs (more than 200 tokens) before the question."""
    pairs = rng.randint(_FAR_PAIRS + 4, 110)
    return _recall_from(
        rng, "recall_far", pairs, asked=rng.randint(4, 8) if train else 1, after=_FAR_PAIRS
    )


def _recall_from(rng: Random, task: str, pairs: int, asked: int, after: int = 0) -> Question:
    """A list of ``pairs`` and ``asked`` questions about entries that have at least ``after`` pairs behind them.

    All questions but the last are earlier turns of the conversation, with their answers.
    """
    keys = rng.sample(WORDS, pairs)
    make = rng.choice((_word, _number, _code))
    values = [make(rng) for _ in keys]
    pair = rng.choice(("{} = {}", "{} : {}", "{} is {}"))
    body = rng.choice((", ", "; ", "\n")).join(
        pair.format(k, v) for k, v in zip(keys, values, strict=True)
    )
    intro = rng.choice(("Here is a list.\n{}\n", "Look at this list: {}. ", "Given {}. "))
    ask = rng.choice(("What is {}?", "What is the value of {}?", "Tell me the value of {}."))
    messages: list[Message] = []
    text = intro.format(body)
    for turn in range(asked):
        at = rng.randrange(pairs - after)
        messages.append(_user(text + ask.format(keys[at])))
        text = ""
        if turn < asked - 1:
            messages.append(_assistant(values[at]))
    return Question(task, messages, None, values[at], body)


# --- local patterns ---------------------------------------------------------------------------------------------------


def _pattern(rng: Random, train: bool) -> Question:
    """Answers that follow from the few letters before: the convolution's state must be right."""
    kind = rng.randrange(4)
    if kind == 0:
        text = _letters(rng, 2, 10)
        prompt, answer = "Double each letter: {}", "".join(c + c for c in text)
    elif kind == 1:
        text = _letters(rng, 2, 10)
        text = text[: len(text) // 2 * 2]
        prompt, answer = (
            "Swap each pair: {}",
            "".join(text[i + 1] + text[i] for i in range(0, len(text), 2)),
        )
    elif kind == 2:
        text = "".join(rng.sample(string.ascii_uppercase[:-1], rng.randint(2, 10)))
        prompt, answer = "Write the next letter of each: {}", "".join(chr(ord(c) + 1) for c in text)
    else:
        period = _letters(rng, 2, 5)
        shown = rng.randint(2 * len(period), 3 * len(period))
        endless = period * 8
        text = endless[:shown]
        prompt, answer = "Continue with six letters: {}", endless[shown : shown + 6]
    return Question("pattern", [_user(prompt.format(text))], None, answer, text)


# --- counting and sums ------------------------------------------------------------------------------------------------


def _count_up(rng: Random, train: bool) -> Question:
    first = rng.randint(0, 88)
    last = first + rng.randint(2, 11)
    numbers = [str(i) for i in range(first, last + 1)]
    if rng.random() < 0.3:
        numbers.reverse()
        prompt = rng.choice(("Count down from {} to {}.", "Count backwards from {} to {}."))
    else:
        prompt = rng.choice(("Count from {} to {}.", "Count up from {} to {}."))
    text = prompt.format(numbers[0], numbers[-1])
    return Question(
        "count_up", [_user(text)], None, " ".join(numbers), f"{numbers[0]} to {numbers[-1]}"
    )


def _count_letters(rng: Random, train: bool) -> Question:
    letters = rng.sample(string.ascii_uppercase, 3)
    text = "".join(rng.choices(letters, k=rng.randint(3, 9)))
    prompt = rng.choice(("How many {1} are in {0}?", "Count the letter {1} in {0}."))
    letter = rng.choice(letters)
    return Question(
        "count_letters", [_user(prompt.format(text, letter))], None, str(text.count(letter)), text
    )


def _sum(rng: Random, train: bool) -> Question:
    a, b = rng.randint(0, 49), rng.randint(0, 49)
    prompt = rng.choice(("What is {} + {}?", "{} + {} = ?", "How much is {} + {}?"))
    return Question("sum", [_user(prompt.format(a, b))], None, str(a + b), f"{a} + {b}")


# --- tools ------------------------------------------------------------------------------------------------------------


def _filler(rng: Random, what: str) -> str | int:
    match what:
        case "city":
            return rng.choice(CITIES)
        case "name":
            return rng.choice(NAMES)
        case "room":
            return rng.choice(ROOMS)
        case "hour":
            return rng.randint(1, 23)
        case "number":
            return rng.randint(1, 99)
        case _:
            return _words(rng, 1, 4)


def _tool(rng: Random, kind: ToolKind) -> tuple[dict[str, Any], list[str]]:
    """A tool with names of the kind and its arguments in any order; also their names, in the kind's order."""
    names = [rng.choice(options) for options, _, _ in kind.parameters]
    order = rng.sample(range(len(names)), len(names))
    schema = {
        "type": "object",
        "properties": {names[i]: {"type": kind.parameters[i][1]} for i in order},
        "required": [names[i] for i in order],
    }
    function = {
        "name": rng.choice(kind.names),
        "description": kind.description,
        "parameters": schema,
    }
    return {"type": "function", "function": function}, names


def _tool_list(rng: Random) -> tuple[list[dict[str, Any]], list[_Request]]:
    """One to four tools, and for each a function that makes a request for it."""
    kinds = rng.sample(TOOL_KINDS, rng.randint(1, 4))
    made = [_tool(rng, kind) for kind in kinds]
    requests: list[_Request] = [
        partial(_request, rng, kind, *pair) for kind, pair in zip(kinds, made, strict=True)
    ]
    return [tool for tool, _ in made], requests


def _request(
    rng: Random, kind: ToolKind, tool: dict[str, Any], names: list[str]
) -> tuple[str, str, dict[str, Any]]:
    """What a user asks, the function that answers it and its arguments in the order of the schema."""
    values = {
        name: _filler(rng, what) for name, (_, _, what) in zip(names, kind.parameters, strict=True)
    }
    text = rng.choice(kind.requests).format(*values.values())
    function = tool["function"]
    return (
        text,
        function["name"],
        {name: values[name] for name in function["parameters"]["required"]},
    )


def _tool_call(rng: Random, train: bool) -> Question:
    """In training, up to two requests with their calls and results come before."""
    tools, requests = _tool_list(rng)
    messages: list[Message] = []
    for _ in range(rng.randint(0, 2) if train else 0):
        messages += _tool_turn(rng, rng.choice(requests))
    text, name, arguments = rng.choice(requests)()
    answer = call_text(name, arguments)
    return Question("tool_call", [*messages, _user(text)], tools, answer, answer)


def _tool_turn(rng: Random, request: _Request) -> list[Message]:
    """A request, the call, what came back, and the assistant saying so."""
    text, name, arguments = request()
    result = rng.choice((_words(rng, 1, 3), _number(rng), _code(rng)))
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        _user(text),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result},
        _assistant(f"The result is {result}."),
    ]


def _tool_result(rng: Random) -> Question:
    """The second half of a tool call."""
    tools, requests = _tool_list(rng)
    *messages, last = _tool_turn(rng, rng.choice(requests))
    return Question(
        "turns", messages, tools, last["content"], f"{messages[0]['content']} {last['content']}"
    )


# --- several turns ----------------------------------------------------------------------------------------------------


def _turns(rng: Random, train: bool) -> Question:
    kind = rng.randrange(4)
    if kind == 0:
        return _tool_result(rng)
    between = [m for _ in range(rng.randint(0, 3)) for m in _small_turn(rng, train)]
    if kind == 1:
        turn = _small_turn(rng, train)
        answer = turn[1]["content"]
        return Question(
            "turns", [*between, *turn, _user("Say that again.")], None, answer, turn[0]["content"]
        )
    thing, value = (
        rng.choice(WORDS),
        rng.choice((_word, _number, _code, lambda r: r.choice(NAMES)))(rng),
    )
    remember = [_user(f"Remember that my {thing} is {value}."), _assistant("OK.")]
    return Question(
        "turns",
        [*remember, *between, _user(f"What is my {thing}?")],
        None,
        value,
        f"{thing} {value}",
    )


def _small_turn(rng: Random, train: bool) -> list[Message]:
    question = draw(rng, rng.choice(("copy", "pattern", "sum")), train=train)
    return [*question.messages, _assistant(question.answer)]


_MAKERS: dict[str, Callable[[Random, bool], Question]] = {
    "copy": _copy,
    "recall": _recall,
    "recall_far": _recall_far,
    "pattern": _pattern,
    "count_up": _count_up,
    "count_letters": _count_letters,
    "sum": _sum,
    "tool_call": _tool_call,
    "turns": _turns,
}
TASKS: tuple[str, ...] = tuple(_MAKERS)
