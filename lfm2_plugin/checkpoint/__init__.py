"""What an LFM2-MoE checkpoint contains: the one table of names, and the ledger that accounts for every tensor."""

from lfm2_plugin.checkpoint.adapter import (
    AdapterError,
    AdapterPart,
    adapter_scaling,
    read_adapter,
)
from lfm2_plugin.checkpoint.ledger import Ledger, check_checkpoint, plan_of
from lfm2_plugin.checkpoint.names import Target, expected_tensors, translate
from lfm2_plugin.checkpoint.quantisation import QuantisationPlan, UnsupportedQuantisation
from lfm2_plugin.checkpoint.readers import inspect_files
from lfm2_plugin.checkpoint.report import CheckpointError, CheckpointReport

__all__ = [
    "AdapterError",
    "AdapterPart",
    "CheckpointError",
    "CheckpointReport",
    "Ledger",
    "QuantisationPlan",
    "Target",
    "UnsupportedQuantisation",
    "adapter_scaling",
    "check_checkpoint",
    "expected_tensors",
    "inspect_files",
    "plan_of",
    "read_adapter",
    "translate",
]
