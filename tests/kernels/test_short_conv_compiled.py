"""What the short convolution's kernel compiles to for GPUs that aren't here: wide accesses, no registers spilled."""

from __future__ import annotations

import pytest

from lfm2_plugin.ops.short_conv.triton import CHANNELS, ROWS
from tests.kernels.gpu_code import compiled
from tests.tiers import matrix

# The published models; the taps lie tap after tap, the states channel after channel ("vLLM"), or the two columns of
# each channel side by side, taken as one integer ("SGLang") or not ("columns apart").
COMMON = {
    "weight_stride_channel": 1,
    "out_stride_channel": 1,
    "HAS_BIAS": False,
    "HAS_ACCEPTED": False,
    "HAS_CHECKPOINTS": False,
    "PAIRED": False,
    "K": 3,
    "HEAD": 2,
    "DECODE_LEN": 1,
    "ROWS": ROWS,
    "BLOCK": CHANNELS,
}
CHANNELS_LAST = {"state_stride_channel": 1}
SIDE_BY_SIDE = {"state_stride_channel": 1, "state_stride_column": 1, "PAIRED": True}
VARIANTS = {
    "vLLM": COMMON | CHANNELS_LAST,
    "vLLM, checkpoints": COMMON | CHANNELS_LAST | {"HAS_CHECKPOINTS": True},
    "vLLM, 3 drafts": COMMON | CHANNELS_LAST | {"HAS_ACCEPTED": True, "HEAD": 4, "DECODE_LEN": 4},
    "SGLang": COMMON | SIDE_BY_SIDE,
    "SGLang, snapshots": COMMON | SIDE_BY_SIDE | {"HAS_CHECKPOINTS": True},
    "columns apart": COMMON | {"state_stride_channel": 2, "state_stride_column": 1},
    "width 8": COMMON | CHANNELS_LAST | {"K": 8, "HEAD": 7},
}
SCALARS = 12  # single values that a program reads: of its sequence, or of the sequences of its rows


@pytest.fixture(scope="module")
def hopper() -> dict:
    return compiled("short_conv", VARIANTS, "cuda", "90")


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "columns apart"])
def test_every_access_to_channels_is_wide(hopper, name: str) -> None:
    found = hopper[name]
    assert found["stores"] == found["wide_stores"] > 0
    assert found["loads"] - found["wide_loads"] <= SCALARS


def test_states_of_another_dtype_than_the_inputs_are_narrow(hopper) -> None:
    """Where two columns of a channel lie side by side, and aren't taken as one integer: what the pairs save."""
    width, values = 3, 8  # a thread's
    states = (width - 1) * values
    found = hopper["columns apart"]
    assert states <= found["loads"] - found["wide_loads"] <= SCALARS + states
    assert found["stores"] - found["wide_stores"] == states


@pytest.mark.parametrize("name", VARIANTS)
def test_no_register_is_spilled(hopper, name: str) -> None:
    assert hopper[name]["spilled"] == 0
    if VARIANTS[name]["K"] == 3:  # of 128 threads, 4 programs a multiprocessor at the least
        assert hopper[name]["registers"] <= 128


@pytest.mark.parametrize(
    ("backend", "arch"), [matrix("cuda", "75"), matrix("cuda", "120"), matrix("hip", "gfx942")]
)
def test_other_gpus_compile_it(backend: str, arch: str) -> None:
    found = compiled(
        "short_conv", {name: VARIANTS[name] for name in ("vLLM", "SGLang")}, backend, arch
    )
    assert set(found) == {"vLLM", "SGLang"}
    assert not any(variant.get("spilled") for variant in found.values())
