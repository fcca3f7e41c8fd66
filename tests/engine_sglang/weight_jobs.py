"""What the tests of weight updates run inside the child, beside the steps that all tests have."""

import time
from pathlib import Path

from tests.engine_sglang import engine_jobs


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


def from_tensors(llm, folder: str, names: list[str] | None = None, piece: int = 40) -> dict:
    """The same out of this process' memory, some tensors at a time; all of them or the named ones.

    A name may be given as [name in the file, name that the engine is told].
    """
    from safetensors.torch import load_file

    (file,) = Path(folder).glob("*.safetensors")
    tensors = load_file(file)
    pairs = [n if isinstance(n, list) else [n, n] for n in (names or tensors)]
    wait_until_idle(llm)
    llm.begin_weight_update()
    for start in range(0, len(pairs), piece):
        part = [(told, tensors[name]) for name, told in pairs[start : start + piece]]
        success, message = llm.update_weights_from_tensor(part)[:2]
        if not success:
            break
    llm.end_weight_update()
    return {"success": success, "message": message}


def run_engine(model: str, engine: dict, steps: list[dict]) -> dict:
    """As in ``engine_jobs``, with these steps: "from_disk" and "from_tensors"."""
    engine_jobs.STEPS |= {"from_disk": from_disk, "from_tensors": from_tensors}
    return engine_jobs.run_engine(model, engine, steps)
