"""What runs inside the child: SGLang's options resolved and the config read, no engine started."""

import os
from typing import Any

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

from benchmarks.models import config_of
from lfm2_plugin.arch import Lfm2MoeArch
from sglang_model.support import check_stages


def resolve(model: str, given: dict[str, Any]) -> dict[str, Any]:
    """What a launcher comes to: the dtype and the architecture, or the error."""
    load_plugins()
    try:
        arguments = ServerArgs(model_path=model, **given)
        arguments.resolve_once()
        config = ModelConfig.from_server_args(arguments)
        _ = config.hf_config.arch
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "error": None,
        "dtype": str(config.dtype),
        "architectures": config.hf_config.architectures,
    }


def stages(partitions: list[list[int]]) -> list[str | None]:
    """What LFM2-24B-A2B in pipeline stages of so many layers each is refused with."""
    arch = Lfm2MoeArch.from_config(config_of("24b"))
    found: list[str | None] = []
    for partition in partitions:
        os.environ["SGLANG_PP_LAYER_PARTITION"] = ",".join(map(str, partition))
        try:
            check_stages(arch, len(partition))
            found.append(None)
        except ValueError as error:
            found.append(str(error))
    return found
