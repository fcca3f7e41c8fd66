"""The environment of every engine of this suite."""

from tests.engine_common.engines import CACHE

# One thread per engine: two engines may run side by side, and the order of float additions is fixed.
ENV = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two workers on one NUMA node
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_AOT_COMPILE": "0",  # its artefacts fail to load back on the CPU: compiles every time
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # lets a test run a function on the workers' models
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "TRITON_F32_DEFAULT": "ieee",  # on a GPU, vLLM's kernels multiply float32 by TF32 otherwise
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CACHE_ROOT": str(CACHE / "vllm"),
    "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
}
