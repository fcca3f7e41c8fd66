"""CUDA graphs of prefills with the convolutions in gaps: what of them can run without a GPU.

The recording of kernels and its replay need one.
"""

import pytest

from tests.engine_common.references import NEW_TOKENS, assert_same, cases
from tests.engine_sglang.releases import needs_newest
from tests.tiers import matrix

pytestmark = [pytest.mark.engine, needs_newest]

WANTED = {"cuda_graph_backend_prefill": "breakable"}
COUNT = 60


def probe(name: str) -> dict:
    return {"op": "probe", "module": "tests.engine_sglang.prefill_graph_jobs", "name": name}


def test_sglang_accepts_the_model_where_the_user_wants_the_graphs(run):
    engine = {"dtype": "float32", **WANTED}
    accepted, replayed = run("alpha", engine, [probe("accepted"), probe("captured_and_replayed")])[
        "steps"
    ]
    layers = list(range(len(accepted["layers"])))
    assert accepted == {"handlers": True, "supported": True, "layers": layers}
    assert replayed == {"captured": True, "replayed": True, "padding": True}


def test_they_stay_off_where_nobody_wants_them(run):
    (accepted,) = run("alpha", {"dtype": "float32"}, [probe("accepted")])["steps"]
    assert not accepted["handlers"]
    assert not accepted["supported"]


@pytest.mark.parametrize(
    "options",
    [
        matrix({"disable_radix_cache": True}),
        matrix({}),
        {"chunked_prefill_size": 48, "enable_mixed_chunk": True},
    ],
    ids=["no cache", "cache", "mixed"],
)
def test_padded_prefills_with_gaps_answer_the_same(run, options):
    """Twice, so that with the prefix cache the second time continues states that the first has kept."""
    model = "alpha"
    asked = [c for c in cases(model) if len(c.prompt) <= 600][:COUNT]
    generate = {"prompts": [c.prompt for c in asked], "params": {"max_new_tokens": NEW_TOKENS}}
    engine = {"dtype": "float32", **WANTED, **options}
    steps = [probe("run_as_graphs"), generate, dict(generate), probe("gaps")]
    _, first, again, gaps = run(model, engine, steps)["steps"]
    assert_same(first, asked)
    assert_same(again, asked)
    assert gaps["steps"] > 1
    assert gaps["padding"] > 0
    assert gaps["convolutions"] == gaps["steps"] * gaps["layers"] > 0
