"""What is loaded goes into a parameter, or there is a reason that it has none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import CheckpointError, Ledger, plan_of
from lfm2_plugin.checkpoint.loader import Loader
from lfm2_plugin.checkpoint.placement import Place
from tests import tiny
from tests.engine_common.int8_weights import W8A8, w8a8

ARCH = Lfm2MoeArch.from_config(tiny.make_config())
GATE = "model.layers.3.feed_forward.gate"
KEYS = "model.layers.2.self_attn.k_scale"


class Copies(Loader):
    modules = {"self_attn.scales": "self_attn.attn"}

    def write(self, where: Place, parameter: nn.Parameter, tensor: torch.Tensor) -> bool:
        parameter.data.copy_(tensor)
        return True


class Parameters(nn.Module):
    """A model of which only the named parameters are there."""

    def __init__(self, **parameters: torch.Tensor) -> None:
        super().__init__()
        self.there = {n: nn.Parameter(t, requires_grad=False) for n, t in parameters.items()}

    def named_parameters(self, *args, **kwargs):
        return iter(self.there.items())


def load(tensors: dict[str, torch.Tensor], model: Parameters, *, kv_is_quantised=False) -> Copies:
    plan = plan_of(ARCH, {**W8A8, "ignore": ["lm_head"]}, tensors)
    loader = Copies(model, range(ARCH.num_layers), kv_is_quantised=kv_is_quantised)
    loader.load(Ledger(ARCH, plan), tensors.items())
    return loader


def quantised_gate() -> dict[str, torch.Tensor]:
    values, scale = w8a8(torch.ones(ARCH.num_experts, ARCH.hidden_size))
    return {f"{GATE}.weight": values, f"{GATE}.weight_scale": scale}


def test_a_scale_of_a_layer_that_the_engine_built_plain() -> None:
    codes = torch.zeros(ARCH.num_experts, ARCH.hidden_size, dtype=torch.int8)
    with pytest.raises(CheckpointError, match=f"without a place.*: {GATE}.weight_scale"):
        load(quantised_gate(), Parameters(**{f"{GATE}.weight": codes}))


def test_codes_do_not_go_into_numbers() -> None:
    gate = {
        f"{GATE}.{n}": torch.zeros(s) for n, s in (("weight", (8, 128)), ("weight_scale", (8, 1)))
    }
    with pytest.raises(CheckpointError, match=f"without a place.*: {GATE}.weight[.]?"):
        load(quantised_gate(), Parameters(**gate))


def test_a_scale_of_a_cache_that_is_not_quantised() -> None:
    scale = {KEYS: torch.ones(1)}
    assert load(scale, Parameters()).loaded == set()
    with pytest.raises(CheckpointError, match=f"without a place.*: {KEYS}"):
        load(scale, Parameters(), kv_is_quantised=True)


def test_what_nothing_was_loaded_into() -> None:
    there = {name: torch.zeros_like(tensor) for name, tensor in quantised_gate().items()}
    loader = load(quantised_gate(), Parameters(**there, **{"other.weight": torch.ones(1)}))
    assert loader.loaded == set(there)
    assert loader.unfilled() == ["other.weight"]
