"""What vLLM sees of the model through its interfaces, asked inside a running engine."""

import pytest

pytestmark = pytest.mark.engine

ENGINE = {"dtype": "float32", "enable_prefix_caching": False}


@pytest.fixture(scope="module")
def found(run) -> dict:
    names = (
        "interfaces",
        "auxiliary_hidden_states",
        "partial_weight_update",
        "expert_count_update",
    )
    steps = [
        {"op": "probe", "name": name, "module": "tests.engine_vllm.interface_probes"}
        for name in names
    ]
    return dict(zip(names, run("small", ENGINE, steps)["steps"], strict=True))


def test_every_interface_is_seen(found):
    assert found["interfaces"] == {
        "supports_pp": True,
        "supports_lora": True,
        "is_hybrid": True,
        "has_inner_state": True,
        "is_mixture_of_experts": True,
        "supports_eagle": True,
        "supports_eagle3": True,
        "num_moe_layers": 1,
        "num_logical_experts": 4,
        "num_physical_experts": 4,
        "num_shared_experts": 0,
    }


def test_eagle3_gets_what_the_layers_saw(found):
    states = found["auxiliary_hidden_states"]
    assert states["count"] == 3
    assert states["differences"] == [0, 0]
    assert min(states["moved"]) > 0
    assert states["plain_output"]
    assert states["default_layers"]


def test_a_weight_update_may_bring_a_part(found):
    update = found["partial_weight_update"]
    assert update["norm"]
    assert update["conv"]
    assert update["other_kept"]
    assert update["loaded"] == [
        "model.layers.0.operator_norm.weight",
        "model.layers.0.short_conv.conv.weight",
    ]
    assert update["refused"].startswith("CheckpointError")
    assert "operator_norm.wieght" in update["refused"]


def test_the_number_of_experts_on_a_rank_is_fixed(found):
    assert "can't change while serving" in found["expert_count_update"]
