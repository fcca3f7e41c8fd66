"""``lfm2 demo``: the demo model in a real server, asked over HTTP."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from lfm2_plugin.cli.server import ServerFailed, failure, free_port, serving
from lfm2_plugin.demo import model_path
from lfm2_plugin.demo.tasks import Question, is_right, questions
from lfm2_plugin.doctor.engines import ENGINES as DOCTORS_ENGINES
from lfm2_plugin.doctor.vllm_cpu import command_findings
from lfm2_plugin.switch import SWITCH, switched_off

NAME = "lfm2-demo"
TIMEOUT_S = 1200
# What our model writes to the server's log when it is built: the proof of who serves.
SERVED_BY = re.compile(r"LFM2-MoE is served by (\S+?)\.?$", re.MULTILINE)
HUGGING_FACE_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")


def run(engine: str, model: str, port: int, keep: bool, options: Sequence[str] = ()) -> int:
    """Serve with further options of the engine's own, ask, print; exit status 0 when both answers came, else 1."""
    try:
        chosen = ENGINES[engine if engine in ENGINES else installed_engine()]
        port = usable_port(port)
        command = [*chosen.command(served_model(model), port), *options]
        check_caches()
        with log_file() as log:
            demonstrate(chosen, command, f"http://127.0.0.1:{port}", log, keep)
    except KeyboardInterrupt:
        print("\nstopped")
        return 0 if keep else 130
    except (OSError, ServerFailed) as error:
        print(f"lfm2 demo: {error}", file=sys.stderr)
        return 1
    print("server stopped")
    return 0


def demonstrate(engine: "Engine", command: list[str], url: str, log: Path, keep: bool) -> None:
    """Start the server, ask it, print what came back; with ``keep``, stay for as long as it serves.

    Raises:
        ServerFailed: it did not come up, did not answer, or ended by itself.
    """
    print(f"starting {engine.name} on {url} (log: {log})", flush=True)
    for name, value in engine.environment.items():
        os.environ.setdefault(name, value)
    # A plain kill unwinds the stack like Ctrl-C does, so that the server is stopped with us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start = time.monotonic()
    with serving(
        command, url, log, TIMEOUT_S, lambda text: print(f"  {text}", flush=True)
    ) as server:
        print(f"ready after {time.monotonic() - start:.0f} s")
        try:
            ask_both(url)
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise failure(f"a request failed ({reason})", log) from error
        print(f"\nno benchmark: {engine.pace}one request at a time; the demo model is tiny")
        print(f"served by  {served_by(log, engine.name)}", flush=True)
        if keep:
            print(f"the server runs on at {url} as model {NAME!r}; Ctrl-C stops it", flush=True)
            raise failure(f"the server ended by itself with exit status {server.wait()}", log)


def usable_port(port: int) -> int:
    """The port asked for, or for 0 one that is free.

    Raises:
        ServerFailed: another program listens there.
    """
    try:
        return free_port(port)
    except OSError as error:
        raise ServerFailed(
            f"port {port} can't be had ({error.strerror}): name another one with --port, or none for a free one"
        ) from None


def served_model(model: str) -> str:
    """What the engine is told to serve: a checkpoint's folder, a name on Hugging Face, by default the demo model.

    Raises:
        ServerFailed: it is a path, and no checkpoint is there.
    """
    if not model:
        return str(model_path())
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        raise ServerFailed(f"--model {model}: no checkpoint, the folder lacks a config.json")
    if not path.exists() and not HUGGING_FACE_NAME.fullmatch(model):
        raise ServerFailed(
            f"--model {model}: no such folder; give one that holds a checkpoint, or a name such as LiquidAI/LFM2-8B-A1B"
        )
    return str(path) if path.exists() else model


def check_caches() -> None:
    """That the engines, torch and Hugging Face will be able to write their caches.

    Raises:
        ServerFailed: they can't.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    try:
        caches.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=caches).close()
    except OSError as error:
        raise ServerFailed(
            f"{caches}, where engines keep their caches, can't be written ({error.strerror}): set HOME to a folder "
            "that can be, or XDG_CACHE_HOME"
        ) from None


@contextlib.contextmanager
def log_file() -> Iterator[Path]:
    """Where the server's log goes: a folder of its own, left behind only for an error that names it."""
    folder = Path(tempfile.mkdtemp(prefix="lfm2-demo-"))
    wanted = False
    try:
        yield folder / "server.log"
    except ServerFailed:
        wanted = True
        raise
    finally:
        if not wanted:
            shutil.rmtree(folder)


def vllm_command(model: str, port: int) -> list[str]:
    """``vllm serve`` of the environment that this Python belongs to.

    Raises:
        ServerFailed: vLLM is not installed there, or its command can't work.
    """
    beside = Path(sys.executable).with_name("vllm")
    program = str(beside) if beside.exists() else shutil.which("vllm")
    if program is None:
        raise ServerFailed(
            f"vLLM is not installed in this Python: {DOCTORS_ENGINES['vllm'].install}"
        )
    for finding in command_findings():
        if finding.status == "fault":
            raise ServerFailed(f"{finding.text}. {finding.remedy}")
    options = ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)]
    options += ["--max-model-len", "2048", "--max-num-seqs", "8"]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "lfm2"]
    # Eager mode has the same tokens, and compiling costs more time than two answers can win back.
    options += ["--enforce-eager"]
    return [program, "serve", model, *options]


def sglang_command(model: str, port: int) -> list[str]:
    """SGLang's server in this Python.

    Raises:
        ServerFailed: SGLang is not installed.
    """
    if importlib.util.find_spec("sglang") is None:
        raise ServerFailed(
            f"SGLang is not installed in this Python: {DOCTORS_ENGINES['sglang'].install}"
        )
    options = ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)]
    options += ["--context-length", "2048", "--max-running-requests", "8"]
    options += ["--tool-call-parser", "lfm2"]
    return [sys.executable, "-m", "sglang.launch_server", "--model-path", model, *options]


@dataclass(frozen=True)
class Engine:
    """How the demo starts an engine.

    Attributes:
        name: as its makers write it.
        command: of a model's folder and a port, the server's command line.
        environment: variables that the server needs unless they are set.
        pace: what keeps it below its speed here, for the reader of the figures.
    """

    name: str
    command: Callable[[str, int], list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    pace: str = ""


ENGINES = {
    # vLLM takes 90 % of a CPU machine's memory for its cache unless told otherwise; the demo needs little.
    "vllm": Engine("vLLM", vllm_command, {"VLLM_CPU_KVCACHE_SPACE": "1"}, pace="eager mode, "),
    "sglang": Engine("SGLang", sglang_command),
}


def installed_engine() -> str:
    """The first engine that is installed in this Python; "vllm" where none is, whose command says what to do."""
    return next((name for name in ENGINES if importlib.util.find_spec(name)), "vllm")


def ask_both(url: str) -> None:
    """One chat completion and one that streams; prints both with their speed."""
    whole, streamed = (
        questions(seed=7, n=1, task="copy")[0],
        questions(seed=7, n=1, task="recall")[0],
    )
    start = time.monotonic()
    text, tokens = complete(url, whole)
    show("chat completion", whole, text, tokens, time.monotonic() - start)
    start = time.monotonic()
    text, tokens = stream(url, streamed)
    show("streamed", streamed, text, tokens, time.monotonic() - start)


def body(question: Question, **more: Any) -> dict[str, Any]:
    """A greedy chat request."""
    return {
        "model": NAME,
        "messages": question.messages,
        "temperature": 0,
        "max_tokens": 128,
        **more,
    }


def complete(url: str, question: Question) -> tuple[str, int]:
    """The reply to a chat completion and how many tokens it took."""
    response = httpx.post(f"{url}/v1/chat/completions", json=body(question), timeout=300)
    response.raise_for_status()
    answer = response.json()
    return answer["choices"][0]["message"]["content"] or "", answer["usage"]["completion_tokens"]


def stream(url: str, question: Question) -> tuple[str, int]:
    """The same, put together from server-sent events."""
    request = body(question, stream=True, stream_options={"include_usage": True})
    text, tokens = "", 0
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=request, timeout=300) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return text, tokens


def show(title: str, question: Question, text: str, tokens: int, seconds: float) -> None:
    """Print a question, the reply, whether it is the known answer, and the speed."""
    verdict = "right" if is_right(question, text) else f"wrong, the answer is {question.answer!r}"
    asked = question.messages[-1]["content"]
    print(f"\n{title} ({question.task})")
    print(f"  asked    {asked[:300]}{' ...' if len(asked) > 300 else ''}")
    print(f"  replied  {text.strip()}")
    print(
        f"  {verdict}; {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s",
        flush=True,
    )


def served_by(log: Path, engine: str = "vLLM") -> str:
    """The class that the server built, from its log.

    Raises:
        ServerFailed: our model did not announce itself, although nobody switched it off.
    """
    found = SERVED_BY.search(log.read_text(errors="replace"))
    if found:
        return found[1]
    if switched_off():
        return f"{engine}'s built-in model ({SWITCH}=off)"
    raise ServerFailed(
        f"another model than ours answered: `lfm2 doctor` tells which and why (log: {log})"
    )
