"""What runs inside the child: one engine, a list of steps, plain JSON out.

Token ids go in and come out; a tokenizer is loaded only where a step needs text.
"""

import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

from sglang.srt.entrypoints.engine import Engine

from tests.engine_sglang.step_recorder import run_recording_scheduler

DEFAULTS = {
    "context_length": 2304,
    "max_running_requests": 64,
    "max_total_tokens": 1 << 16,
    "max_mamba_cache_size": 4096,
    "random_seed": 0,
    "skip_tokenizer_init": True,
    "log_level": "info",
}
PATIENCE_S = 30
# What a test may ask of the engine's resolved options.
OPTIONS = ("mamba_radix_cache_strategy", "disable_overlap_schedule", "attention_backend", "device")
OPTIONS += ("max_total_num_tokens",)


class ForkedEngine(Engine):
    """SGLang's engine, its processes forked from this one, which has everything imported already."""

    run_scheduler_process_func = staticmethod(run_recording_scheduler)

    @classmethod
    def _launch_scheduler_processes(cls, *args, **kwargs):
        # SGLang has just asked for "spawn"; the detokenizer, which comes after, is forked as well.
        multiprocessing.set_start_method("fork", force=True)
        return super()._launch_scheduler_processes(*args, **kwargs)


def start(model: str, engine: dict[str, Any]) -> ForkedEngine:
    return ForkedEngine(model_path=model, **{**DEFAULTS, **engine})


def run_engine(model: str, engine: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Starts one engine and runs the steps in it, in order.

    Returns:
        {"steps": one result a step, "class": the model class of each rank, "loop": which event loop
        ran, "scheduled": the batches that the first rank ran, "options": some of the engine's,
        "seconds": [start, steps]}
    """
    begin = time.monotonic()
    llm = start(model, engine)
    started = time.monotonic()
    results = [STEPS[step.pop("op", "generate")](llm, **step) for step in steps]
    ranks = ask_ranks(llm, "report")
    info = llm.get_server_info()
    return {
        "steps": results,
        "class": [rank["class"] for rank in ranks],
        "loop": ranks[0]["loop"],
        "scheduled": ranks[0]["steps"],
        "options": {name: info[name] for name in OPTIONS},
        "seconds": [round(started - begin, 1), round(time.monotonic() - started, 1)],
    }


def ask_ranks(llm: Engine, method: str, **arguments) -> list:
    """The answer of the recording scheduler's method on every rank, pipeline stages first."""
    options = llm.server_args.resolved_dict()
    ranks = options["tp_size"] * options["pp_size"]
    with tempfile.TemporaryDirectory() as folder:
        llm.collective_rpc(method, folder=folder, **arguments)
        deadline = time.monotonic() + PATIENCE_S
        while (
            len(found := sorted(Path(folder).glob("*.json"))) < ranks
        ):  # later stages answer later
            assert time.monotonic() < deadline, f"{len(found)} of {ranks} ranks answered"
            time.sleep(0.02)
        return [json.loads(path.read_text()) for path in found]


def request(
    logprobs: int | None = None, prompt_logprobs: bool = False, json_schema=None, **fields
) -> dict:
    """Keyword arguments of ``Engine.generate`` for one prompt."""
    if json_schema is not None:
        fields["json_schema"] = json.dumps(json_schema)
    values = {"temperature": 0.0, "max_new_tokens": 16, "ignore_eos": True, **fields}
    wanted: dict[str, Any] = {"sampling_params": values}
    if logprobs is not None or prompt_logprobs:
        wanted |= {"return_logprob": True, "top_logprobs_num": logprobs or 0}
        wanted["logprob_start_len"] = 0 if prompt_logprobs else -1
    return wanted


def together(requests: list[dict]) -> dict:
    """The same for a batch: one list for each argument."""
    names = {name for wanted in requests for name in wanted}
    absent = {"return_logprob": False, "top_logprobs_num": 0, "logprob_start_len": -1}
    return {name: [wanted.get(name, absent.get(name)) for wanted in requests] for name in names}


def generate(
    llm: Engine,
    prompts: list[list[int]] | list[str],
    params: dict | list[dict] | None = None,
    alone: bool = False,
    lora: str | None = None,
) -> list[dict]:
    """Generates for every prompt, all at once or one after another (``alone``)."""
    each = params if isinstance(params, list) else [params or {}] * len(prompts)
    requests = [request(**fields) for fields in each]
    kind = "prompt" if isinstance(prompts[0], str) else "input_ids"
    if lora is not None:
        requests = [{**wanted, "lora_path": lora} for wanted in requests]
    if alone:
        pairs = zip(prompts, requests, strict=True)
        outs = [as_list(llm.generate(**{kind: p}, **wanted)) for p, wanted in pairs]
        return [describe(out) for out in outs]
    flat = as_list(llm.generate(**{kind: prompts}, **together(requests)))
    counts = [wanted["sampling_params"].get("n", 1) for wanted in requests]
    assert len(set(counts)) == 1, "SGLang takes one n for a batch"
    return [describe(flat[i : i + counts[0]]) for i in range(0, len(flat), counts[0])]


def as_list(out) -> list[dict]:
    return out if isinstance(out, list) else [out]


def describe(outs: list[dict]) -> dict:
    """One request's result: the first completion's fields, all completions under ``all``."""
    completions = [completion(out) for out in outs]
    return {**completions[0], "all": completions}


def completion(out: dict) -> dict:
    meta = out["meta_info"]
    described = {
        "tokens": out.get("output_ids"),
        "text": out.get("text"),
        "finish": meta["finish_reason"]["type"],
        "stop": meta["finish_reason"].get("matched"),
        "cached": meta["cached_tokens"],
        "retractions": meta["num_retractions"],
    }
    if "output_token_logprobs" in meta:
        described["logprobs"] = [value for value, *_ in meta["output_token_logprobs"]]
        described["prompt_logprobs"] = [value for value, *_ in meta["input_token_logprobs"]]
    if meta.get("output_top_logprobs"):
        described["top"] = [
            {str(token): value for value, token, *_ in place}
            for place in meta["output_top_logprobs"]
        ]
    return described


def probe(llm: Engine, name: str, module: str = "tests.engine_sglang.probes", **arguments) -> Any:
    """What ``<module>.<name>`` finds on the model of the first rank."""
    return ask_ranks(llm, "probe", name=name, module=module, arguments=arguments)[0]


STEPS = {"generate": generate, "probe": probe}
