"""What runs inside the child: the benchmarks' engine up to the point where vLLM would start it."""

from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from benchmarks.engines import Flags, VllmEngine


class Settled(Exception):
    """How many tokens a step may have by vLLM's defaults."""


class NotStarted(VllmEngine):
    """Asks vLLM for its defaults, which depend on the machine and on who starts the engine, and stops there."""

    def _start(self, arguments: EngineArgs, usage_context: Any) -> None:
        by_context, _ = arguments.get_batch_defaults(world_size=1)
        raise Settled(by_context.get(usage_context))


def tokens_of_a_step(model: str) -> int | None:
    """How many tokens a step of the benchmarks' engine may have on an H100, where its flags don't say."""
    kind = type(current_platform)
    kind.is_cpu = lambda *_: False
    kind.get_device_total_memory = lambda *_: 80 * 2**30
    kind.get_device_name = lambda *_: "NVIDIA H100 80GB HBM3"
    try:
        NotStarted(Flags(Path(model), random_weights=True))
    except Settled as settled:
        return settled.args[0]
    return None
