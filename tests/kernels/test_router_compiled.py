"""What the router's kernel compiles to for GPUs that aren't here: no register is spilled."""

from __future__ import annotations

import pytest

from lfm2_plugin.ops.router.triton import TOKENS
from tests.kernels.gpu_code import compiled
from tests.tiers import matrix

EXPERTS = (8, 16, 32, 64, 128)
VARIANTS = {
    f"{experts} experts": {
        "HAS_BIAS": True,
        "HAS_PADDING": True,
        "RENORMALISE": True,
        "E": experts,
        "A": 4,
        "EXPERTS": experts,
        "TOKENS": TOKENS,
    }
    for experts in EXPERTS
}


@pytest.mark.parametrize(
    ("backend", "arch"),
    [("cuda", "90"), matrix("cuda", "75"), matrix("cuda", "120"), matrix("hip", "gfx942")],
)
def test_compiles_without_spilling(backend: str, arch: str) -> None:
    found = compiled("router", VARIANTS, backend, arch)
    assert set(found) == set(VARIANTS)
    if backend == "cuda":
        assert all(variant["spilled"] == 0 for variant in found.values())
        assert all(variant["registers"] <= 64 for variant in found.values()), found
