"""The environment of every engine of this suite."""

# One thread per engine: two engines may run side by side, and the order of float additions is fixed.
ENV = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
