"""What the tests of adapters run inside the child, beside the steps that all tests have."""

from tests.engine_sglang import engine_jobs, weight_jobs
from tests.engine_sglang.engine_jobs import as_list, describe, request, together


def generate(llm, prompts: list[list[int]], adapters: list[str | None]) -> list[dict]:
    """Generates for every prompt, each with its adapter, all at once."""
    requests = [{**request(), "lora_path": name} for name in adapters]
    return [
        describe([out]) for out in as_list(llm.generate(input_ids=prompts, **together(requests)))
    ]


def load(llm, name: str, path: str) -> dict:
    """Loads an adapter into the running engine: {"success", "error"}."""
    result = llm.load_lora_adapter(name, path)
    return {"success": result.success, "error": result.error_message}


def update(llm, path: str) -> bool:
    """Writes another checkpoint's weights over the base model's."""
    answer = weight_jobs.from_disk(llm, path)
    assert answer["success"], answer["message"]
    return True


def run_engine(model: str, engine: dict, steps: list[dict]) -> dict:
    """As in ``engine_jobs``, with these steps: "adapted", "load" and "update"."""
    engine_jobs.STEPS |= {"adapted": generate, "load": load, "update": update}
    return engine_jobs.run_engine(model, engine, steps)
