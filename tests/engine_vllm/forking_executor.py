"""vLLM's executor of several processes, forked from one that has vLLM imported: a third of the time to start."""

import os

from vllm.v1.executor.multiproc_executor import MultiprocExecutor


class ForkingExecutor(MultiprocExecutor):
    """As its base; on a CPU vLLM asks for "spawn", and each worker would import everything again."""

    def _init_executor(self) -> None:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        super()._init_executor()
