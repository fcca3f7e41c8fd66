"""The engines that can be measured, behind one small interface.

Each engine is imported only when it is opened, in a worker process (:mod:`benchmarks.worker`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.workloads import Event, Request


@dataclass(frozen=True)
class Flags:
    """How an engine is started; the same on both sides.

    Attributes:
        folder: the model.
        random_weights: do not read weights, draw them.
        one_process: the scheduler runs in our process and steps when it is told to.
        arguments: the engine's own arguments, passed on as they are.
    """

    folder: Path
    random_weights: bool
    one_process: bool = True
    arguments: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """A running engine.

    Attributes:
        stepping: the engine works only while :meth:`step` runs.
        vocab_size: size of the model's vocabulary.
        model_class: module and name of the class that serves.
    """

    stepping: bool
    vocab_size: int
    model_class: str

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; their numbers count on from 0 since the last :meth:`clear`."""

    def step(self) -> list[Event]:
        """Wait for the next tokens of any request."""

    def clear(self) -> None:
        """Drop what is still running, and count from 0 again."""


def model_class_of(model: Any) -> str:
    """Module and name of a model's class; sent into the engine's worker processes."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


class VllmEngine:
    """vLLM's own engine, as its offline ``LLM`` drives it."""

    def __init__(self, flags: Flags) -> None:
        from vllm import EngineArgs, SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.usage.usage_lib import UsageContext

        arguments = {"dtype": "bfloat16", "disable_log_stats": True} | flags.arguments
        if flags.random_weights:
            arguments |= {"load_format": "dummy", "skip_tokenizer_init": True}
        # What the user leaves open is settled by who asks: of a server on an H100 a step has up to 8,192 tokens, of
        # an engine by itself 2,048.
        self._engine = self._start(
            EngineArgs(model=str(flags.folder), **arguments), UsageContext.OPENAI_API_SERVER
        )
        self.stepping = flags.one_process
        self.vocab_size = self._engine.model_config.get_vocab_size()
        self.model_class = self._engine.apply_model(model_class_of)[0]
        self._params = lambda count: SamplingParams(
            temperature=0.0,
            max_tokens=count,
            min_tokens=count,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._round = self._count = 0
        self._running: dict[str, int] = {}

    def _start(self, arguments: Any, usage_context: Any) -> Any:
        from vllm import LLMEngine

        return LLMEngine.from_engine_args(arguments, usage_context=usage_context)

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            name = f"{self._round}-{self._count}"
            self._running[name] = self._count
            self._count += 1
            prompt = {"prompt_token_ids": list(request.prompt)}
            self._engine.add_request(name, prompt, self._params(request.max_tokens))

    def step(self) -> list[Event]:
        outputs = self._engine.step()
        now = time.perf_counter()
        events = []
        for output in outputs:
            index = self._running[output.request_id]
            if output.finished:
                del self._running[output.request_id]
            events.append(Event(now, index, len(output.outputs[0].token_ids), output.finished))
        return events

    def clear(self) -> None:
        if self._running:
            self._engine.abort_request(list(self._running))
            self._running.clear()
            while self._engine.has_unfinished_requests():
                self._engine.step()
        self._round += 1
        self._count = 0


class SglangEngine:
    """SGLang's offline engine. Its scheduler has a process of its own and runs on between two steps of ours."""

    stepping = False

    def __init__(self, flags: Flags) -> None:
        import sglang

        from lfm2_plugin.register import resolve_sglang

        arguments = {"dtype": "bfloat16", "skip_tokenizer_init": True, "sleep_on_idle": True}
        # The names of vLLM, which the options of a comparison are written in.
        renamed = {"max_model_len": "context_length"}
        arguments |= {renamed.get(name, name): value for name, value in flags.arguments.items()}
        if flags.random_weights:
            arguments["load_format"] = "dummy"
        self.model_class = f"{resolve_sglang()['module']}.Lfm2MoeForCausalLM"
        self._engine = sglang.Engine(model_path=str(flags.folder), **arguments)
        self._loop = self._engine.loop
        self.vocab_size = self._engine.tokenizer_manager.model_config.vocab_size
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            stream = self._stream(len(self._tasks), request)
            self._tasks.append(self._loop.create_task(stream))

    async def _stream(self, index: int, request: Request) -> None:
        params = {"temperature": 0.0, "max_new_tokens": request.max_tokens, "ignore_eos": True}
        pieces = await self._engine.async_generate(
            input_ids=list(request.prompt), sampling_params=params, stream=True
        )
        had = 0
        async for piece in pieces:
            count = piece["meta_info"]["completion_tokens"]
            finished = piece["meta_info"]["finish_reason"] is not None
            now = time.perf_counter()
            self._events.put_nowait(Event(now, index, count - had, finished))
            had = count

    def step(self) -> list[Event]:
        return self._loop.run_until_complete(self._next())

    async def _next(self) -> list[Event]:
        waiting = asyncio.ensure_future(self._events.get())
        await asyncio.wait([waiting, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in self._tasks:
            if task.done():
                task.result()  # raises what the engine raised
        events = [await waiting]
        while not self._events.empty():
            events.append(self._events.get_nowait())
        return events

    def clear(self) -> None:
        for task in self._tasks:
            task.cancel()
        if any(not task.done() for task in self._tasks):
            self._engine.abort_request(abort_all=True)
        self._tasks = []
        self._events = asyncio.Queue()
        self._engine.flush_cache()


ENGINES: dict[str, type[Engine]] = {"vllm": VllmEngine, "sglang": SglangEngine}


def open_engine(name: str, flags: Flags) -> Engine:
    """Start an engine.

    Raises:
        ValueError: no such engine.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}: choose one of {', '.join(ENGINES)}")
    return ENGINES[name](flags)
