"""What the tests of weight updates run inside the child, beside the steps that all tests have."""

from pathlib import Path

from tests.engine_common.checkpoint_files import copy_without_weights, named_tensors
from tests.engine_vllm import engine_jobs

PIECE = 40


def _update(llm, method, *args, **kwargs) -> dict:
    try:
        llm.collective_rpc(method, args=args, kwargs=kwargs)
    except Exception as error:
        return {"success": False, "message": f"{type(error).__name__}: {error}"}
    llm.reset_prefix_cache()  # vLLM leaves that to whoever updates
    return {"success": True, "message": ""}


def load_directly(worker, pairs: list) -> None:
    """What a trainer runs on a worker: some tensors at a time, straight into the model."""
    for start in range(0, len(pairs), PIECE):
        worker.model_runner.model.load_weights(iter(pairs[start : start + PIECE]))


def from_disk(llm, folder: str) -> dict:
    """Writes a checkpoint's weights over the engine's."""
    return _update(llm, "reload_weights", weights_path=folder)


def from_tensors(llm, folder: str, names: list[str] | None = None) -> dict:
    """The same out of this process' memory, some tensors at a time; all of them or the named ones."""
    return _update(llm, load_directly, named_tensors(folder, names))


def reload_tensors(llm, folder: str, names: list[str] | None = None) -> dict:
    """The same in one call of vLLM's ``reload_weights``."""
    return _update(llm, "reload_weights", weights_iterator=named_tensors(folder, names))


def save(llm, folder: str) -> None:
    """Leaves the engine's state, a file a rank, and what belongs to it in a folder."""
    copy_without_weights(Path(llm.model_config.model), Path(folder))
    llm.llm_engine.engine_core.save_sharded_state(path=folder)


def refusal(llm, prompts: list[list[int]]) -> str:
    """What an engine says that answers no more."""
    try:
        engine_jobs.generate(llm, prompts)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run_engine(model: str, engine: dict, steps: list[dict]) -> dict:
    """As in ``engine_jobs``, with the steps above."""
    steps_here = (from_disk, from_tensors, reload_tensors, save, refusal)
    engine_jobs.STEPS |= {step.__name__: step for step in steps_here}
    return engine_jobs.run_engine(model, engine, steps)
