"""Which way a step takes on a GPU, as far as a CPU can show it."""

from types import SimpleNamespace

import pytest
import torch

from lfm2_plugin import dispatch
from vllm_model import conv_state
from vllm_model.conv_state import ConvStateBackend, ConvStepMetadataBuilder
from vllm_model.short_conv import Lfm2ShortConv


@pytest.mark.parametrize(("ops", "ours"), [(None, False), ("auto", False), ("triton", True)])
def test_our_operator_runs_where_the_user_names_one(monkeypatch, ops, ours):
    """Else the engine's kernels, which in a step without metadata means zeros and nothing more."""
    monkeypatch.delenv(dispatch.ENV, raising=False)
    if ops:
        monkeypatch.setenv(dispatch.ENV, ops)
    called = []
    layer = SimpleNamespace(
        forward_native=lambda bcx, out: called.append((bcx, out)), _step=lambda: None
    )
    bcx, out = torch.ones(2, 12), torch.ones(2, 4)
    Lfm2ShortConv.forward_cuda(layer, bcx, out)
    assert bool(called) is ours
    assert bool((out == 0).all()) is not ours


@pytest.mark.parametrize(("ops", "declared"), [("auto", False), ("triton", True)])
def test_batch_invariance_is_declared_of_our_operator_only(monkeypatch, ops, declared):
    monkeypatch.setenv(dispatch.ENV, ops)
    assert ConvStateBackend.supports_batch_invariance()  # on this CPU it is always ours
    monkeypatch.setattr("vllm_model.conv_state.on_cpu", lambda: False)
    assert ConvStateBackend.supports_batch_invariance() is declared


@pytest.mark.parametrize(("ops", "made"), [("auto", True), ("triton", False)])
def test_program_ids_are_made_for_the_engines_kernels_only(monkeypatch, ops, made):
    monkeypatch.setenv(dispatch.ENV, ops)
    monkeypatch.setattr(conv_state, "on_cpu", lambda: False)
    monkeypatch.setattr(conv_state.ShortConvAttentionMetadataBuilder, "__init__", lambda *_: None)
    monkeypatch.setattr(conv_state, "MambaPrefillCheckpointBuilder", lambda *_: None)
    config = SimpleNamespace(
        cache_config=SimpleNamespace(mamba_cache_mode="none"),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
    )
    builder = ConvStepMetadataBuilder(None, [], config, torch.device("cpu"))
    assert builder.needs_causal_conv1d_metadata is made
