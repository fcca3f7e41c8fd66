"""SGLang's pool of keys and values on a CPU."""

from __future__ import annotations

from typing import Any

from .engine_api import MHATokenToKVPool


class CpuKVPool(MHATokenToKVPool):
    """The pool as it is, but for moving entries with torch: where there are drafts it would warm up a Triton kernel."""

    def __init__(self, *args: Any, enable_kv_cache_copy: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, enable_kv_cache_copy=False, **kwargs)
        self.use_native_move_kv_cache = True
