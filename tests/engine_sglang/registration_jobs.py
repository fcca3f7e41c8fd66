"""What the tests of registration run inside the child: SGLang is imported there, its plugins not yet."""

import importlib
import json
import sys

from lfm2_plugin.register import ARCHITECTURE, register_sglang, resolve_sglang
from tests.engine_sglang import engine_jobs


def resolve(path: str | None = None) -> dict:
    """What SGLang resolves, and how its table of models differs from the one of its own models."""
    if path is not None:
        sys.path.insert(0, path)
    answer = resolve_sglang()
    table = importlib.import_module("sglang.srt.models.registry")
    theirs = table.import_model_classes("sglang.srt.models")
    table.ModelRegistry.get_supported_archs()  # has it import what it deferred
    after = dict(table.ModelRegistry.models)
    register_sglang()
    again = table.ModelRegistry.models
    return answer | {
        "known before": ARCHITECTURE in theirs,
        "changed": sorted(a for a in theirs if after.get(a) is not theirs[a]),
        "added": sorted(set(after) - set(theirs)),
        "changed by a second call": sorted(a for a in again if again[a] is not after.get(a)),
    }


def serve(path: str, model: str, engine: dict, steps: list[dict]) -> dict:
    """One engine with the folder ``path`` in front of everything that is imported from here on.

    The fork server has parts of our front imported already; they are forgotten first.
    """
    sys.path.insert(0, path)
    for name in [n for n in sys.modules if n.split(".")[0] == "sglang_model"]:
        del sys.modules[name]
    return engine_jobs.run_engine(model, engine, steps)


if __name__ == "__main__":
    print("RESULT", json.dumps(resolve()))
