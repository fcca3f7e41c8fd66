"""What the fork server imports before the first job: vLLM."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter_mends import stand_in_for_triton_cpu

    stand_in_for_triton_cpu()

import vllm
import vllm.entrypoints.llm
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker

VERSION = vllm.__version__
