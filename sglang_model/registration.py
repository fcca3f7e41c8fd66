"""The proof that SGLang took what ``defaults.py`` tells it, when the model is built."""

from __future__ import annotations

from lfm2_plugin.switch import SWITCH, PluginError

from .config import Lfm2MoeConfig
from .engine_api import HuggingFaceConfig, get_linear_attn_spec, get_server_args, sglang_version

SOURCE = "lfm2-plugin"
"""By this name SGLang keeps what we have decided of its options."""
STATE_BACKEND = "sglang_model.conv_state.ConvStateBackend"
HYBRID_BACKEND = "sglang_model.conv_state.ConvHybridBackend"


def check_registration(config: HuggingFaceConfig) -> None:
    """Refuse to serve with SGLang's own config, state backend or defaults around our model.

    Raises:
        PluginError: what SGLang did not take.
    """
    missing = []
    if not isinstance(config, Lfm2MoeConfig):
        missing.append(f"it read config.json as {type(config).__module__}.{type(config).__name__}")
    else:
        spec = get_linear_attn_spec(config)
        if spec is None or spec.backend_class_name != STATE_BACKEND:
            missing.append(f"it would keep conv states by {spec and spec.backend_class_name}")
    decided = getattr(get_server_args(), "_resolved_overrides", None) or ()
    if not any(source == SOURCE for source, _ in decided):
        missing.append("it did not ask the plugin while it resolved its options")
    if missing:
        raise PluginError(
            f"SGLang {sglang_version} did not take what lfm2-plugin registered: {'; '.join(missing)}. Is {SWITCH} the "
            "same in the process that was started and in its workers? Else another plugin is in the way, or this "
            "release of SGLang is not one that `lfm2 doctor` knows."
        )
