"""The room that imports SGLang: what it probes, its table of names, and a step's metadata as a ConvBatch."""

import ast
import pkgutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sglang_model import engine_api
from sglang_model.engine_names import NAMES, REPLACED

PACKAGE = Path(engine_api.__file__).parent


def test_nothing_is_missing_here():
    assert engine_api.missing_capabilities() == []


def test_a_missing_capability_is_named(monkeypatch):
    monkeypatch.setattr(
        engine_api.inspect, "signature", lambda what: SimpleNamespace(parameters={})
    )
    missing = engine_api.missing_capabilities()
    assert any("routing function" in need for need in missing)
    assert any("snapshots" in need for need in missing)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there(name: str):
    assert getattr(engine_api, name) is not None


@pytest.mark.parametrize("name", REPLACED)
def test_all_that_is_replaced_is_there(name: str):
    assert callable(pkgutil.resolve_name(REPLACED[name]))


def test_another_name_is_not():
    with pytest.raises(AttributeError, match="has no 'Lfm2Moe'"):
        engine_api.Lfm2Moe  # noqa: B018


def test_every_name_of_the_room_is_used():
    """The room is no attic: a name that nobody imports from it goes."""
    used = set()
    for file in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "engine_api":
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "engine_api":
                used.add(node.attr)
    assert set(NAMES) - used == set()


ALWAYS = torch.ones(8, dtype=torch.bool)


def step(mode: str, prefixes: list[int], lengths: list[int], tracked=None) -> SimpleNamespace:
    """The fields of SGLang's ForwardBatch that conv_batch_from reads.

    tracked: (slot, tokens) a sequence, the state of whose query is kept after so many; None for none.
    """
    tracking = tracked is not None
    offsets = [place[1] if place else 7 for place in tracked] if tracking else None
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: mode == "decode"),
        extend_prefix_lens=torch.tensor(prefixes),
        extend_seq_lens_cpu=lengths,
        mamba_track_indices=torch.tensor([p[0] if p else -1 for p in tracked])
        if tracking
        else None,
        mamba_track_mask=torch.tensor([bool(p) for p in tracked]) if tracking else None,
        mamba_track_aligned_lens=lambda: torch.tensor(offsets) if tracking else None,
    )


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def test_a_step_of_decodes():
    batch = engine_api.conv_batch_from(
        torch.tensor([4, 2, 9]), starts([1, 1, 1]), step("decode", [], []), ALWAYS[:3]
    )
    assert batch.slots.tolist() == [4, 2, 9]
    assert batch.query_start.tolist() == [0, 1, 2, 3]
    assert batch.has_initial_state.tolist() == [True, True, True]
    assert (batch.num_decodes, batch.num_prefills, batch.num_tokens) == (3, 0, 3)
    assert batch.checkpoint_slots is None


def test_an_extending_step():
    """A new prompt, a chunk that goes on, and a decode that was mixed in."""
    lengths = [5, 8, 1]
    batch = engine_api.conv_batch_from(
        torch.tensor([4, 2, 9]), starts(lengths), step("extend", [0, 16, 30], lengths), ALWAYS[:3]
    )
    assert batch.has_initial_state.tolist() == [False, True, True]
    assert batch.query_start.tolist() == [0, 5, 13, 14]
    assert (batch.num_decodes, batch.num_prefills, batch.num_tokens) == (0, 3, 14)
    assert batch.checkpoint_offsets is None


def test_snapshots_of_an_extending_step():
    """A sequence that keeps none has offset 0, whatever stands in SGLang's tensor for it."""
    lengths = [5, 8]
    given = step("extend", [0, 16], lengths, tracked=[None, (11, 6)])
    batch = engine_api.conv_batch_from(torch.tensor([4, 2]), starts(lengths), given, ALWAYS[:2])
    assert batch.checkpoint_offsets.tolist() == [0, 6]
    assert batch.checkpoint_slots.tolist() == [-1, 11]
    offsets, slots = engine_api.tracked_prefills(given)
    assert (offsets.tolist(), slots.tolist()) == ([0, 6], [-1, 11])


def test_lengths_that_are_on_the_device_only():
    lengths = [5, 8]
    given = step("extend", [0, 0], lengths)
    given.extend_seq_lens_cpu = None
    batch = engine_api.conv_batch_from(torch.tensor([4, 2]), starts(lengths), given, ALWAYS[:2])
    assert batch.num_tokens == 13


def test_the_dtype_of_states_is_the_users_if_they_say_one(monkeypatch):
    monkeypatch.delenv("SGLANG_MAMBA_CONV_DTYPE", raising=False)
    assert engine_api.conv_state_dtype_of_user() is None
    monkeypatch.setenv("SGLANG_MAMBA_CONV_DTYPE", "float16")
    assert engine_api.conv_state_dtype_of_user() == torch.float16


def test_the_states_are_all_that_a_slot_holds():
    """The recurrent state that SGLang keeps beside the convolution's has no elements."""
    params = engine_api.conv_cache_params(128, 3, (0, 2, 5), torch.float32)
    assert list(params.layers) == [0, 2, 5]
    assert [tuple(shape) for shape in params.shape.conv] == [(128, 2)]
    assert torch.zeros(params.shape.temporal).numel() == 0
    assert params.mamba_cache_per_req == 3 * 128 * 2 * 4


def test_what_a_user_said_is_told_from_what_sglang_filled_in():
    said = SimpleNamespace(_raw_input={"attention_backend": None, "dtype": "float32"})
    assert engine_api.said_by_user(said, "attention_backend") is None
    assert engine_api.said_by_user(said, "dtype") == "float32"
