"""What the fork server imports before the first job: vLLM."""

import vllm
import vllm.entrypoints.llm
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker

VERSION = vllm.__version__
