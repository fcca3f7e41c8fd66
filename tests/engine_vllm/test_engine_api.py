"""The room that imports vLLM: what it probes, and a step's metadata as a ConvBatch.

.venvs/vllm/bin/python -m pytest tests/engine_vllm/test_engine_api.py
"""

import ast
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context

from vllm_model import engine_api
from vllm_model.engine_metadata import conv_batch_from
from vllm_model.replacements import replace_in_engine

ALWAYS = torch.ones(8, dtype=torch.bool)


def common(*lengths: int) -> SimpleNamespace:
    """What conv_batch_from reads of the metadata shared by all layers."""
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return SimpleNamespace(query_start_loc=starts)


def metadata(decode_blocks, prefill_blocks, tokens, **others):
    """vLLM's metadata with the given state blocks; ``tokens``: of decodes and of prefills."""
    fields = {
        "num_decodes": len(decode_blocks),
        "num_decode_tokens": tokens[0],
        "num_prefills": len(prefill_blocks),
        "num_prefill_tokens": tokens[1],
        "num_reqs": len(decode_blocks) + len(prefill_blocks),
        "state_indices_tensor_d": torch.tensor(decode_blocks, dtype=torch.int32).view(
            len(decode_blocks), -1 if decode_blocks else 1
        ),
        "state_indices_tensor_p": torch.tensor(prefill_blocks, dtype=torch.int32),
        "has_initial_states_p": None,
        "query_start_loc_p": None,
        "query_start_loc_d": None,
        "num_accepted_tokens": None,
        "seq_lens": torch.zeros(1, dtype=torch.int32),
    }
    return engine_api.ShortConvAttentionMetadata(**(fields | others))


def test_nothing_is_missing_here():
    assert engine_api.missing_capabilities() == []


def test_a_missing_capability_is_named(monkeypatch):
    monkeypatch.setattr(engine_api, "FusedMoEFactory", lambda num_experts: None)
    missing = engine_api.missing_capabilities()
    assert any("routing function" in need for need in missing)
    assert any("expert weights" in need for need in missing)


class Theirs:
    pass


class Ours(Theirs):
    pass


def in_a_module(monkeypatch, source: str) -> ModuleType:
    """A module of the name "fake" in which ``source`` has run, with the class above."""
    module = ModuleType("fake")
    module.Theirs = Theirs
    exec(source, vars(module))
    monkeypatch.setitem(sys.modules, "fake", module)
    return module


def test_a_class_gives_way_to_its_subclass(monkeypatch):
    module = in_a_module(monkeypatch, "class User:\n    def start(self): return Theirs()")
    for _ in range(2):
        replace_in_engine("fake", "User.start", Theirs, Ours)
        assert type(module.User().start()) is Ours


@pytest.mark.parametrize(
    "source",
    ["class User:\n    def start(self): return 1", "Theirs = int\ndef start(): return Theirs()"],
    ids=["not taken", "another class"],
)
def test_a_class_that_is_not_taken_there_is_an_error(monkeypatch, source):
    module = in_a_module(monkeypatch, source)
    user = "User.start" if hasattr(module, "User") else "start"
    with pytest.raises(RuntimeError, match=f"fake.{user} takes no Theirs"):
        replace_in_engine("fake", user, Theirs, Ours)
    assert getattr(module, "Theirs", None) is not Ours


def test_adapters_read_by_another_class_are_an_error():
    from vllm_model.model import Lfm2MoeForCausalLM

    model = object.__new__(Lfm2MoeForCausalLM)
    with pytest.raises(RuntimeError, match="reads LoRA adapters by a class of its own"):
        model.lora_manager = object()


def test_a_mixed_step():
    has_state = torch.tensor([False, True])
    batch = conv_batch_from(
        metadata([[3], [5]], [7, 9], (2, 6), has_initial_states_p=has_state),
        common(1, 1, 4, 2),
        None,
        ALWAYS,
        max_decode_len=1,
    )
    assert batch.slots.tolist() == [3, 5, 7, 9]
    assert batch.query_start.tolist() == [0, 1, 2, 6, 8]
    assert batch.has_initial_state.tolist() == [True, True, False, True]
    assert (batch.num_decodes, batch.num_prefills, batch.num_tokens) == (2, 2, 8)
    assert (batch.max_decode_len, batch.num_accepted, batch.null_slot) == (1, None, 0)


def test_drafts_take_the_running_block_and_the_accepted_counts_of_the_decodes():
    batch = conv_batch_from(
        metadata(
            [[3, 11, 12], [5, 13, 14]], [], (5, 0), num_accepted_tokens=torch.tensor([2, 3, 1])
        ),
        common(3, 2),
        None,
        ALWAYS,
        max_decode_len=3,
    )
    assert batch.slots.tolist() == [3, 5]
    assert batch.num_accepted.tolist() == [2, 3]
    assert batch.max_decode_len == 3


def test_a_captured_decode_reads_only_what_stays_where_it_is():
    """Each tensor of the step is a view of one that the next step's values are written to."""
    kept = metadata([[3, 11], [5, 13], [0, 0]], [], (3, 0), num_accepted_tokens=torch.ones(4).int())
    shared = common(1, 1, 0)
    batch = conv_batch_from(kept, shared, None, ALWAYS, max_decode_len=2)
    for mine, theirs in (
        (batch.slots, kept.state_indices_tensor_d),
        (batch.query_start, shared.query_start_loc),
        (batch.num_accepted, kept.num_accepted_tokens),
        (batch.has_initial_state, ALWAYS),
    ):
        assert mine.untyped_storage().data_ptr() == theirs.untyped_storage().data_ptr()
    kept.state_indices_tensor_d[:, 0] = torch.tensor([8, 9, 1])
    assert batch.slots.tolist() == [8, 9, 1]
    assert ALWAYS.all()


def test_prefills_alone_carry_no_accepted_counts_and_keep_their_checkpoints():
    checkpoint = SimpleNamespace(
        checkpoint_offsets=torch.tensor([16, 0]), state_indices=torch.tensor([4, 0])
    )
    given = metadata(
        [],
        [2, 6],
        (0, 30),
        has_initial_states_p=torch.tensor([True, False]),
        num_accepted_tokens=torch.tensor([1, 1]),
    )
    batch = conv_batch_from(given, common(20, 10), checkpoint, ALWAYS, 1)
    assert batch.num_accepted is None
    assert batch.checkpoint_offsets.tolist() == [16, 0]
    assert batch.checkpoint_slots.tolist() == [4, 0]


def test_an_empty_step():
    batch = conv_batch_from(metadata([], [], (0, 0)), common(), None, ALWAYS, 1)
    assert batch.slots.shape == (0,)
    assert batch.query_start.tolist() == [0]


def test_the_operator_is_one_that_vllm_splits_a_graph_at():
    from vllm.config import CompilationConfig

    assert "vllm::short_conv" in CompilationConfig._attention_ops


def test_the_operator_calls_a_layer_by_name_with_our_arguments():
    """What decision 0003 rests on, read off the operator's source."""
    from vllm.model_executor.layers.mamba import short_conv

    called = {
        node.func.attr: {keyword.arg for keyword in node.keywords}
        for node in ast.walk(ast.parse(inspect.getsource(short_conv.short_conv).lstrip()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert called["forward_native"] == called["forward_cuda"] == {"hidden_states", "output"}


def test_every_name_of_the_room_is_used():
    """The room is no attic: a name that nobody imports from it goes."""
    package = Path(engine_api.__file__).parent
    used = {
        alias.name
        for file in package.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "engine_api"
        for alias in node.names
    }
    assert set(engine_api.__all__) - used == set()


def test_padding_is_known_unless_the_user_says_that_it_does_not_matter(monkeypatch):
    """With ``VLLM_MOE_SKIP_PADDING=0`` vLLM's second runner leaves the mask as it was captured: all of it padding."""
    mask = torch.ones(4, dtype=torch.bool)
    with set_forward_context(None, VllmConfig(), is_padding=mask):
        assert engine_api.padding_rows(3).tolist() == [True] * 3
        monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", "0")
        assert engine_api.padding_rows(3) is None
    assert engine_api.padding_rows(3) is None
