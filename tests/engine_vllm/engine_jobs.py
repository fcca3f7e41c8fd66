"""What runs inside the child: one engine, a list of steps, plain JSON out.

Token ids go in and come out; a tokenizer is loaded only where a step needs text.
"""

import importlib
import time
import zlib
from typing import Any

from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.sampling_params import StructuredOutputsParams

from tests.engine_common.poison import poison
from tests.engine_vllm.forking_executor import ForkingExecutor

DEFAULTS = {
    "max_model_len": 2304,
    "max_num_seqs": 64,
    "seed": 0,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "disable_log_stats": False,
    "scheduler_cls": "tests.engine_vllm.step_recorder.RecordingScheduler",
}
SEVERAL_PROCESSES = {"tensor_parallel_size", "pipeline_parallel_size"}
FORKED = {"distributed_executor_backend": ForkingExecutor}


@register_model_loader("auto")
@register_model_loader("hf")
class PoisoningLoader(DefaultModelLoader):
    """vLLM's loader of checkpoints, for models whose parameters are NaN until something is loaded into them."""

    def create_model(self, *args, **kwargs):
        return poison(super().create_model(*args, **kwargs))


def run_engine(model: str, engine: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Starts one engine and runs the steps in it, in order.

    Returns:
        {"steps": one result a step, "class": the model class, "metrics": counters at the end,
        "scheduled": what each engine step scheduled, "seconds": [start, steps]}
    """
    begin = time.monotonic()
    executor = FORKED if SEVERAL_PROCESSES & engine.keys() else {}
    llm = LLM(model, **{**DEFAULTS, **executor, **engine})
    started = time.monotonic()
    results = [STEPS[step.pop("op", "generate")](llm, **step) for step in steps]
    return {
        "steps": results,
        "class": llm.apply_model(model_class),
        "metrics": counters(llm),
        "scheduled": scheduled_steps(llm),
        "seconds": [round(started - begin, 1), round(time.monotonic() - started, 1)],
    }


def model_class(model) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def scheduled_steps(llm: LLM) -> list[dict]:
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    return getattr(core.scheduler, "steps", []) if core is not None else []


def counters(llm: LLM) -> dict[str, float]:
    """Sum of every counter that vLLM keeps, by name."""
    totals: dict[str, float] = {}
    for metric in llm.get_metrics():
        value = getattr(metric, "value", None)
        if value is not None:
            totals[metric.name] = totals.get(metric.name, 0) + value
    return totals


def sampling(**fields) -> SamplingParams:
    schema = fields.pop("json_schema", None)
    if schema is not None:
        fields["structured_outputs"] = StructuredOutputsParams(json=schema)
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, **fields})


def logprob_of(entry: dict | None, token: int) -> float | None:
    return None if entry is None else entry[token].logprob


def generate(
    llm: LLM,
    prompts: list[list[int]] | list[str],
    params: dict | list[dict] | None = None,
    alone: bool = False,
    lora: str | None = None,
) -> list[dict]:
    """Generates for every prompt, all at once or one after another (``alone``)."""
    from vllm.lora.request import LoRARequest

    each = params if isinstance(params, list) else [params or {}] * len(prompts)
    settings = [sampling(**fields) for fields in each]
    inputs = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in prompts]
    # The engine keeps adapters by number, so every folder needs one of its own.
    extra = {"lora_request": LoRARequest(lora, zlib.crc32(lora.encode()), lora)} if lora else {}
    if alone:
        pairs = zip(inputs, settings, strict=True)
        outs = [llm.generate([i], s, use_tqdm=False, **extra)[0] for i, s in pairs]
    else:
        outs = llm.generate(inputs, settings, use_tqdm=False, **extra)
    return [describe(out) for out in outs]


def describe(out) -> dict:
    """One request's result: the first completion's fields, all completions under ``all``."""
    completions = [
        {
            "tokens": list(c.token_ids),
            "text": c.text,
            "finish": c.finish_reason,
            "stop": c.stop_reason,
            "logprobs": c.logprobs
            and [logprob_of(e, t) for e, t in zip(c.logprobs, c.token_ids, strict=True)],
            "top": c.logprobs and [{k: v.logprob for k, v in e.items()} for e in c.logprobs],
        }
        for c in out.outputs
    ]
    described = {**completions[0], "all": completions, "cached": out.num_cached_tokens}
    if out.prompt_logprobs is not None:
        pairs = zip(out.prompt_logprobs, out.prompt_token_ids, strict=True)
        described["prompt_logprobs"] = [logprob_of(e, t) for e, t in pairs]
    return described


def turns(llm: LLM, prompts: list[list[int]], follow: list[list[list[int]]], params: dict) -> list:
    """Several turns a conversation: prompt, answer, more prompt, answer... all side by side.

    Args:
        follow: for every turn after the first, one list of new tokens per conversation
    """
    history, answers = [list(p) for p in prompts], []
    for new in [None, *follow]:
        if new is not None:
            history = [h + n for h, n in zip(history, new, strict=True)]
        outs = generate(llm, history, params)
        answers.append([{**out, "prompt": list(h)} for out, h in zip(outs, history, strict=True)])
        history = [h + out["tokens"] for h, out in zip(history, outs, strict=True)]
    return answers


def kv_groups(llm: LLM) -> list[dict]:
    """Kind, layer count and page bytes of every KV cache group that the engine planned."""
    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    return [
        {
            "kind": type(group.kv_cache_spec).__name__,
            "layers": len(group.layer_names),
            "page": group.kv_cache_spec.page_size_bytes,
            "block": group.kv_cache_spec.block_size,
        }
        for group in config.kv_cache_groups
    ]


def probe(llm: LLM, name: str, module: str = "tests.engine_vllm.probes") -> Any:
    """What ``<module>.<name>`` finds on the model of the first worker."""
    return llm.apply_model(getattr(importlib.import_module(module), name))[0]


STEPS = {"generate": generate, "turns": turns, "kv_groups": kv_groups, "probe": probe}
