"""A scheduler that remembers what it ran, and that a test can ask about the model inside.

It takes the place of SGLang's own by SGLang's hook for that, in the processes of a test's engine only.
"""

import importlib
import json
from pathlib import Path

from sglang.srt.managers.scheduler import Scheduler, run_scheduler_process
from sglang.srt.model_loader import loader
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_parallel

from tests.engine_common.poison import poison


class RecordingScheduler(Scheduler):
    """The engine's scheduler. The methods without underscore that are new here are called by RPC."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loop = ""
        self.steps: list[dict] = []

    def event_loop_overlap(self):
        self.loop = "overlap"
        super().event_loop_overlap()

    def event_loop_normal(self):
        self.loop = "normal"
        super().event_loop_normal()

    def event_loop_pp(self):
        self.loop = "pp"
        super().event_loop_pp()

    def run_batch(self, batch, *args, **kwargs):
        mode = batch.forward_mode
        if batch.reqs:
            tokens = list(batch.extend_lens) if mode.is_extend() else [1] * len(batch.reqs)
            self.steps.append({"mode": mode.name, "tokens": tokens})
        return super().run_batch(batch, *args, **kwargs)

    @property
    def _model(self):
        return self.tp_worker.model_runner.model

    def _answer(self, folder: str, value) -> None:
        parallel = get_parallel()
        path = Path(folder) / f"{parallel.pp_rank}.{parallel.tp_rank}"
        path.write_text(json.dumps(value))
        path.rename(path.with_name(f"{path.name}.json"))  # whole when it is seen

    def report(self, folder: str) -> None:
        """What a test reads at the end of its engine: model class, event loop, steps, open requests."""
        kind = type(self._model)
        name = f"{kind.__module__}.{kind.__qualname__}"
        held = len(self.running_batch.reqs) + len(self.waiting_queue)
        found = {"class": name, "loop": self.loop, "steps": self.steps, "unfinished": held}
        self._answer(folder, found)

    def probe(self, folder: str, name: str, module: str, arguments: dict) -> None:
        """What ``<module>.<name>`` finds on the model."""
        function = getattr(importlib.import_module(module), name)
        self._answer(folder, function(self._model, **arguments))


def poisoned_model(build, *args, **kwargs):
    """As SGLang's loaders make a model, parameters that nothing is loaded into being NaN."""
    return poison(build(*args, **kwargs))


def run_recording_scheduler(*args, **kwargs) -> None:
    """SGLang's scheduler process with the recording scheduler and poisoned parameters in it."""
    build = loader._initialize_model
    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler", RecordingScheduler, HookType.REPLACE
    )
    HookRegistry.register(
        "sglang.srt.model_loader.loader._initialize_model", poisoned_model, HookType.AROUND
    )
    HookRegistry.apply_hooks()
    assert loader._initialize_model is not build  # SGLang only logs what it couldn't hook
    run_scheduler_process(*args, **kwargs)
