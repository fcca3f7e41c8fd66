"""The lists of a quantization_config, written out in full names: vLLM quantises exactly what they leave in."""

import pytest

from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.quantised_lists import METHODS, MODEL, promised, written
from tests.tiers import matrix
from vllm_model.weights import VllmLoader

pytestmark = pytest.mark.engine

THEIRS = {"awq": "auto_awq", "gptq": "auto_gptq", "gptq_model": "auto_gptq"}


@pytest.mark.parametrize("count", [6, matrix(60)])
def test_vllm_quantises_what_the_config_promises(server, count):
    made = {method: written(method, count) for method in METHODS}
    asked = [(THEIRS.get(m, m), config) for m, configs in made.items() for config, _ in configs]
    found = server.run(
        "quantisation_jobs:run_engine",
        model=str(checkpoint(MODEL)),
        engine={"dtype": "float32"},
        steps=[{"op": "decisions", "configs": asked}],
    ).get()["steps"][0]
    plans = [(method, plan) for method, configs in made.items() for _, plan in configs]
    different = []
    for (method, plan), layers in zip(plans, found, strict=True):
        expected = promised(plan, VllmLoader.modules)
        assert expected.keys() <= layers.keys()
        different += [
            (method, name, value, layers[name])
            for name, value in expected.items()
            if layers[name] != value
        ]
    assert not different, (len(different), different[:10])
