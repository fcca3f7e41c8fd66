"""What an LFM2-MoE checkpoint contains: the one table of names, and the check that nothing is amiss."""

from lfm2_plugin.checkpoint.adapter import (
    AdapterError,
    AdapterPart,
    adapter_scaling,
    read_adapter,
)
from lfm2_plugin.checkpoint.names import Target, expected_tensors, translate
from lfm2_plugin.checkpoint.report import (
    CheckpointError,
    CheckpointReport,
    StreamCheck,
    check_checkpoint,
    inspect_safetensors,
)

__all__ = [
    "AdapterError",
    "AdapterPart",
    "CheckpointError",
    "CheckpointReport",
    "StreamCheck",
    "Target",
    "adapter_scaling",
    "check_checkpoint",
    "expected_tensors",
    "inspect_safetensors",
    "read_adapter",
    "translate",
]
