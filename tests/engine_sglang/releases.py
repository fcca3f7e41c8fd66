"""What a supported release of SGLang can't do on a CPU: the tests of it are skipped there, with the reason."""

import pytest

from sglang_model import SUPPORTED
from sglang_model.engine_api import sglang_version, snapshots_can_run

needs_snapshots = pytest.mark.skipif(
    not snapshots_can_run(),
    reason="SGLang 0.5.22 can keep no snapshots of states on a CPU, so its prefix cache finds whole requests only",
)
needs_newest = pytest.mark.skipif(
    sglang_version != SUPPORTED[1], reason=f"the arithmetic is that of SGLang {SUPPORTED[1]}"
)
needs_rust_templates = pytest.mark.skipif(
    sglang_version != SUPPORTED[1],
    reason="the Rust server of SGLang 0.5.22 says that the demo model has no usable chat template",
)
