"""What the tests of adapters run inside the child, beside the steps that all tests have."""

from collections.abc import Callable
from typing import Any

from vllm import LLM
from vllm.lora.request import LoRARequest

from tests.engine_vllm import engine_jobs


def refused(llm: LLM, prompt: list[int], folders: dict[str, str]) -> dict[str, str]:
    """What a request with each adapter, after one without, is answered with: name -> the error, "" if served."""

    def ask(request: LoRARequest) -> None:
        prompts = [{"prompt_token_ids": prompt}] * 2
        params = engine_jobs.sampling(max_tokens=2)
        llm.generate(prompts, params, lora_request=[None, request], use_tqdm=False)

    return {request.lora_name: said(ask, request) for request in requests(folders)}


def refused_by_workers(llm: LLM, folders: dict[str, str]) -> dict[str, str]:
    """What loading each adapter into the engine, as a server does, is answered with."""
    return {r.lora_name: said(llm.llm_engine.add_lora, r) for r in requests(folders)}


def requests(folders: dict[str, str]) -> list[LoRARequest]:
    return [LoRARequest(name, 900 + n, path) for n, (name, path) in enumerate(folders.items())]


def said(call: Callable[[LoRARequest], object], request: LoRARequest) -> str:
    try:
        call(request)
    except Exception as error:
        return str(error)
    return ""


def run_engine(model: str, engine: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """As in ``engine_jobs``, with these steps: "refused" and "refused_by_workers"."""
    engine_jobs.STEPS |= {"refused": refused, "refused_by_workers": refused_by_workers}
    return engine_jobs.run_engine(model, engine, steps)
