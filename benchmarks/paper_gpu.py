"""A GPU on paper: SGLang's questions to a device about its memory, answered from figures."""

from __future__ import annotations

from typing import Any

from sglang_model.cpu_platform import PortableCpuPlatform


class PaperGpu(PortableCpuPlatform):
    """Our CPU platform without what is made for a CPU, and with the memory of another device."""

    device_name = device_type = "paper_gpu"
    _total = _used = 0

    def hold(self, total: int, used: int) -> None:
        """From now on be a device with ``total`` bytes of memory, ``used`` of them."""
        self._total, self._used = total, used

    def init_backend(self) -> None:
        """No step is run."""

    def apply_server_args_defaults(self, server_args: Any) -> None:
        server_args.device = self.device_name

    def get_default_attention_backend(self) -> str:
        """SGLang's choice on a Hopper GPU."""
        return "fa3"

    def get_device_total_memory(self, device_id: int = 0) -> int:
        return self._total

    def get_current_memory_usage(self, device: Any = None) -> float:
        return float(self._used)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        return self._total - self._used, self._total
