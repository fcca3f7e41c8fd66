"""What an LFM2-MoE checkpoint contains: the one table of names, and the ledger that accounts for every tensor."""

from lfm2_plugin.checkpoint.adapter import (
    ADAPTABLE,
    AdapterPart,
    read_adapter,
    read_adapter_tensors,
    unified,
)
from lfm2_plugin.checkpoint.adapter_config import AdapterConfig, AdapterError, read_adapter_config
from lfm2_plugin.checkpoint.ledger import Ledger, check_checkpoint, plan_of
from lfm2_plugin.checkpoint.names import Target, expected_tensors, translate
from lfm2_plugin.checkpoint.quantisation import QuantisationPlan, UnsupportedQuantisation
from lfm2_plugin.checkpoint.readers import inspect_files
from lfm2_plugin.checkpoint.report import CheckpointError, CheckpointReport

__all__ = [
    "ADAPTABLE",
    "AdapterConfig",
    "AdapterError",
    "AdapterPart",
    "CheckpointError",
    "CheckpointReport",
    "Ledger",
    "QuantisationPlan",
    "Target",
    "UnsupportedQuantisation",
    "check_checkpoint",
    "expected_tensors",
    "inspect_files",
    "plan_of",
    "read_adapter",
    "read_adapter_config",
    "read_adapter_tensors",
    "translate",
    "unified",
]
