"""What SGLang asks the config of a model with conv states for: which layers have them, of what shape and dtype."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lfm2_plugin.arch import Lfm2MoeArch, UnsupportedConfig
from lfm2_plugin.checkpoint import CheckpointError, UnsupportedQuantisation, check_checkpoint
from lfm2_plugin.checkpoint.quantisation import explicit
from lfm2_plugin.checkpoint.readers import holds_weights
from lfm2_plugin.checkpoint.spellings import hub_name

from .engine_api import (
    ConvCacheParams,
    HuggingFaceConfig,
    conv_cache_params,
    conv_state_dtype_of_user,
)

logger = logging.getLogger("sglang.lfm2_plugin")

ARCHITECTURE = "Lfm2MoeForCausalLM"
SNAPSHOT_GRID = 2
"""Tokens between two places of a prompt where a state can be kept for the prefix cache.

Our operator can leave a state after any token, but SGLang marks a place inside a piece of prompt by adding one to it
and rounding down to the grid, so two is the finest that it can name.
"""

_PADDED = {
    "num_attention_heads": "original_num_attention_heads",
    "num_key_value_heads": "original_total_num_kv_heads",
    "intermediate_size": "original_intermediate_size",
    "moe_intermediate_size": "original_moe_intermediate_size",
}
"""What SGLang rounds up for several ranks on a CPU, and where it keeps the config's own. Our layers need no padding."""


_ADDED = {"context_len", "swa_head_dim", "swa_v_head_dim", *_PADDED.values()}
"""What SGLang puts into a config beside the model's own entries."""


def arch_of(config: HuggingFaceConfig) -> Lfm2MoeArch:
    """The checked model shape, that of the checkpoint. Raises UnsupportedConfig."""
    values = config.to_dict()
    values |= {name: values[kept] for name, kept in _PADDED.items() if values.get(kept)}
    entries = {name: value for name, value in values.items() if name not in _ADDED}
    return Lfm2MoeArch.from_config(config, entries)


class Lfm2MoeConfig(HuggingFaceConfig):
    """The Hugging Face config with the properties that SGLang's hybrid cache reads.

    Not a subclass of SGLang's own: that one is tied to SGLang's state backend by an isinstance check, which comes
    before the registry that names ours.
    """

    _state_dtype: torch.dtype | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """As in transformers, and what SGLang would stumble over or guess where a config.json is silent.

        Without ``architectures`` its first look at the config fails. Without ``dtype`` it takes float16, where vLLM
        asks the weights, which are bfloat16 in every published model of the family.
        """
        super().__post_init__(**kwargs)
        if self.architectures is None:
            self.architectures = [ARCHITECTURE]
        if self.dtype is None:
            self.dtype = torch.bfloat16
            if self.layer_types:  # not the class's own defaults
                logger.warning(
                    "The config has no dtype: bfloat16 is taken, unless --dtype says otherwise"
                )

    @property
    def arch(self) -> Lfm2MoeArch:
        """The checked model shape. Raises UnsupportedConfig."""
        return arch_of(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; and lists of modules are written out before SGLang matches them by rules of its own."""
        made = super().from_dict(config_dict, **kwargs)
        (made[0] if isinstance(made, tuple) else made).name_modules_explicitly()
        return made

    def name_modules_explicitly(self) -> None:
        """Write out the lists of modules in the quantization_config, by the names in the checkpoint's files.

        What is wrong with either is said when the model is built.
        """
        settings, folder = self.quantisation_settings, Path(self.name_or_path)
        if settings is None or not holds_weights(folder):
            return
        with suppress(UnsupportedConfig, CheckpointError, UnsupportedQuantisation):
            plan = check_checkpoint(arch_of(self), folder, settings)
            self.quantization_config = explicit(settings, plan, hub_name)

    @property
    def quantisation_settings(self) -> dict[str, Any] | None:
        """The quantization_config that came with the checkpoint; None for an unquantised one."""
        settings = getattr(self, "quantization_config", None)
        return settings.to_dict() if hasattr(settings, "to_dict") else settings

    @property
    def full_attention_layer_ids(self) -> list[int]:
        return list(self.arch.attention_layers)

    @property
    def linear_layer_ids(self) -> list[int]:
        """The layers with a conv state."""
        return list(self.arch.conv_layers)

    @property
    def mamba_chunk_size(self) -> int:
        return SNAPSHOT_GRID

    def use_state_dtype(self, model_dtype: torch.dtype) -> None:
        """Keep conv states in the model's dtype (the model says so as it is built, before the cache is)."""
        self._state_dtype = model_dtype

    @property
    def mamba2_cache_params(self) -> ConvCacheParams:
        """Shape (D per rank, K-1) and dtype of one state, and the layers that have one.

        The dtype is that of ``SGLANG_MAMBA_CONV_DTYPE`` if the user set it, else the model's. (SGLang's own default is
        bfloat16 whatever the model is: a float32 model then gives other tokens.)
        """
        arch = self.arch
        dtype = conv_state_dtype_of_user() or self._state_dtype or torch.bfloat16
        return conv_cache_params(arch.hidden_size, arch.conv_width, arch.conv_layers, dtype)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers; the state's dtype is no entry of a config."""
        values = super().to_dict()
        values.pop("_state_dtype", None)
        return values
