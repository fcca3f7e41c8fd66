"""What the tests of weight updates run inside the child, beside the steps that all tests have."""

import time
from pathlib import Path

from tests.engine_common.checkpoint_files import copy_without_weights, named_tensors
from tests.engine_sglang import engine_jobs

PIECE = 40


def wait_until_idle(llm) -> None:
    """An answer can come a moment before its request leaves the scheduler, which then flushes no cache."""
    deadline = time.monotonic() + engine_jobs.PATIENCE_S
    while engine_jobs.ask_ranks(llm, "report")[0]["unfinished"]:
        assert time.monotonic() < deadline, "the engine doesn't come to rest"
        time.sleep(0.02)


def from_disk(llm, folder: str) -> dict:
    """Writes a checkpoint's weights over the engine's."""
    wait_until_idle(llm)
    success, message = llm.update_weights_from_disk(folder)[:2]
    return {"success": success, "message": message}


def from_tensors(llm, folder: str, names: list | None = None) -> dict:
    """The same out of this process' memory, some tensors at a time; all of them or the named ones."""
    pairs = named_tensors(folder, names)
    wait_until_idle(llm)
    llm.begin_weight_update()
    for start in range(0, len(pairs), PIECE):
        success, message = llm.update_weights_from_tensor(pairs[start : start + PIECE])[:2]
        if not success:
            break
    llm.end_weight_update()
    return {"success": success, "message": message}


def save(llm, folder: str) -> None:
    """Leaves the engine's state, a file a rank, and what belongs to it in a folder."""
    copy_without_weights(Path(llm.server_args.model_path), Path(folder))
    llm.save_sharded_model(path=folder, pattern=None, max_size=None)


def run_engine(model: str, engine: dict, steps: list[dict]) -> dict:
    """As in ``engine_jobs``, with the steps above."""
    engine_jobs.STEPS |= {step.__name__: step for step in (from_disk, from_tensors, save)}
    return engine_jobs.run_engine(model, engine, steps)
