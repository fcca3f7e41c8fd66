"""The platform of :mod:`benchmarks.stock_sglang`: a CPU, and SGLang's own torch code for everything."""

from __future__ import annotations

from typing import Any

from sglang_model.cpu_platform import PortableCpuPlatform


class StockCpuPlatform(PortableCpuPlatform):
    """Our CPU platform without what makes it fast."""

    def init_backend(self) -> None:
        """No attention and no experts of ours."""

    def post_load_model(self, model: Any) -> None:
        """Weights stay as they were loaded."""

    def apply_server_args_defaults(self, server_args: Any) -> None:
        server_args.device = "cpu"
        server_args.attention_backend = "torch_native"
        server_args.disable_cuda_graph = True

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def support_mamba_cache_extra_buffer(self) -> bool:
        return False
