"""What the engines' suites look for after each load: a parameter that nothing was loaded into."""

import pytest
import torch
from torch import nn

from tests.engine_common.poison import poison


class Model(nn.Module):
    """Two parameters and a scale."""

    __module__ = "vllm_model.model"

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))
        self.scale = nn.Parameter(torch.tensor([-1.0]))

    def load_weights(self, weights: dict[str, torch.Tensor]) -> set[str]:
        for name, tensor in weights.items():
            getattr(self, name).data.copy_(tensor)
        return set(weights)


def test_a_parameter_that_nothing_fills_is_named():
    model = poison(Model())
    assert bool(model.a.isnan().all())
    assert float(model.scale) == -1
    with pytest.raises(AssertionError, match=r"\['b'\]"):
        model.load_weights({"a": torch.ones(2, 2)})


def test_updates_after_a_whole_load_may_bring_a_part():
    model = poison(Model())
    assert model.load_weights({"a": torch.ones(2, 2), "b": torch.ones(3)}) == {"a", "b"}
    assert model.load_weights({"a": torch.zeros(2, 2)}) == {"a"}
