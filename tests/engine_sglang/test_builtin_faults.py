"""Each fault of SGLang's built-in LFM2-MoE that shows on a CPU: shown in the built-in, and absent here.

``LFM2_PLUGIN=off`` brings the built-in back; ``builtin_jobs`` says what it runs on. What only a GPU shows
(the fused kernels, the CUDA graphs, the routing without a bias) is not here. A test that asserts a fault
fails once SGLang mends it: then the fault leaves this file and the README.
"""

import pytest
import torch

from tests.engine_common.broken import BROKEN, unsaid
from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.conversations import ANSWER, shared_beginnings
from tests.engine_common.engines import BUILTIN
from tests.engine_common.references import NEW_TOKENS, assert_same, cases, wrong
from tests.engine_sglang.releases import needs_snapshots
from tests.tolerances import assert_within

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

FLOAT = {"dtype": "float32"}
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture
def builtin(server):
    """Runs the built-in model: builtin("small", engine, steps) -> outcome."""

    def start(model, engine: dict, steps: list[dict], env: dict[str, str] | None = None):
        folder = str(checkpoint(model) if isinstance(model, str) else model)
        variables = {**BUILTIN, **TWO_RANKS, **(env or {})}
        job = "builtin_jobs:run_engine"
        return server.run(job, model=folder, engine=engine, steps=steps, env=variables)

    return start


def ask(name: str, count: int = 40) -> tuple[dict, tuple]:
    """A generate step for the first prompts of a checkpoint, and their cases."""
    asked = cases(name, count)
    return {"prompts": [c.prompt for c in asked]}, asked


def probe(name: str) -> dict:
    return {"op": "probe", "name": name}


@pytest.fixture(scope="module")
def default(server, run) -> dict[str, dict]:
    """What one engine of either side says of itself, without any option of a user's but the dtype."""
    shared = shared_beginnings("alpha", common=256, count=8)
    steps = [
        probe("head_is_the_embedding"),
        probe("drafter_methods"),
        probe("routing"),
        {
            "prompts": [c.prompt for c in shared],
            "params": {"max_new_tokens": ANSWER},
            "alone": True,
        },
    ]
    model = str(checkpoint("alpha"))
    job = "builtin_jobs:run_engine"
    theirs = server.run(job, model=model, engine=FLOAT, steps=steps, env=BUILTIN).get()
    return {"builtin": theirs, "ours": run("alpha", FLOAT, steps)}


@needs_snapshots
def test_the_overlap_scheduler_is_off(default):
    found = {
        side: (
            answer["loop"],
            answer["options"]["disable_overlap_schedule"],
            answer["options"]["mamba_radix_cache_strategy"],
        )
        for side, answer in default.items()
    }
    assert found["builtin"] == ("normal", True, "no_buffer")
    assert found["ours"] == ("overlap", False, "extra_buffer")


@needs_snapshots
def test_a_shared_beginning_is_never_found(default):
    """Without snapshots where prompts part, a state is of use only to whoever repeats all of a prompt."""
    cached = {
        side: [out["cached"] for out in answer["steps"][3]] for side, answer in default.items()
    }
    assert set(cached["builtin"]) == {0}
    assert min(cached["ours"][2:]) >= 254


def test_a_tied_head_is_stored_twice(default):
    assert default["builtin"]["steps"][0] is False
    assert default["ours"]["steps"][0] is True


def test_a_drafter_finds_no_methods(default):
    assert not any(default["builtin"]["steps"][1].values())
    assert all(default["ours"]["steps"][1].values())


def reference_routing(found: dict) -> torch.Tensor:
    """(2, A) weights, as transformers computes them."""
    scores = torch.tensor(found["logits"]).sigmoid()
    chosen = (scores + torch.tensor(found["bias"])).topk(2, dim=-1).indices
    weights = scores.gather(1, chosen)
    return weights / (weights.sum(-1, keepdim=True) + 1e-6)


def test_routing_epsilon(default):
    builtin, ours = (default[side]["steps"][2] for side in ("builtin", "ours"))
    want = reference_routing(builtin).sum(-1)
    got = torch.tensor(builtin["weights"]).sum(-1)
    assert want[1] < 0.5
    assert got[1] == pytest.approx(1.0)  # scores of 1e-7 blown up to a sum of one
    got = torch.tensor(ours["weights"]).sort(-1).values
    assert_within("router", got, reference_routing(ours).sort(-1).values)


def test_states_are_rounded_to_bfloat16_whatever_the_model_is(run, builtin):
    step, asked = ask("alpha", 200)
    rounded = builtin("alpha", FLOAT, [step]).get()["steps"][0]
    assert len(wrong(rounded, asked)) > 20
    exact = builtin("alpha", FLOAT, [step], env={"SGLANG_MAMBA_CONV_DTYPE": "float32"})
    assert_same(exact.get()["steps"][0], asked)  # so it was the states
    assert_same(run("alpha", FLOAT, [step])["steps"][0], asked)


def test_head_dim_is_ignored(run, builtin):
    step, asked = ask("wide_heads")
    outcome = builtin("wide_heads", FLOAT, [step])
    assert outcome.error or wrong(outcome.value["steps"][0], asked)
    assert_same(run("wide_heads", FLOAT, [step])["steps"][0], asked)


def test_vectors_for_tokens_are_ignored(server, builtin):
    """Different prompts as vectors get one and the same answer; here each gets its own."""
    prompts = [c.prompt for c in cases("alpha", 40) if len(c.prompt) == 9]
    prompts += [list(reversed(prompt)) for prompt in prompts]
    folder = str(checkpoint("alpha"))
    step = {"op": "embeddings", "prompts": prompts, "folder": folder, "tokens": NEW_TOKENS}
    engine = {**FLOAT, "disable_radix_cache": True}

    def different(value: dict) -> int:
        return len({tuple(out["tokens"]) for out in value["steps"][0]})

    assert len(prompts) > 1
    assert different(builtin("alpha", engine, [step]).get()) == 1
    job = "interface_jobs:run_engine"
    ours = server.run(job, model=folder, engine=engine, steps=[step]).get()
    assert different(ours) == len(prompts)


def test_a_pipeline_is_refused(run, builtin):
    step, asked = ask("staged")
    engine = {**FLOAT, "pp_size": 2}
    outcome = builtin("staged", engine, [step])
    assert outcome.error
    assert "assert self.pp_group.is_first_rank and self.pp_group.is_last_rank" in outcome.log
    assert_same(run("staged", engine, [step], env=TWO_RANKS)["steps"][0], asked)


@pytest.mark.parametrize("name", ["missing tensors", "missing expert", "extra tensor"])
def test_a_checkpoint_that_does_not_fit_is_served(run, builtin, tmp_path, name):
    make, words = BROKEN[name]
    folder = make(tmp_path / "model")
    assert builtin(folder, FLOAT, [{"prompts": [[16, 17, 18]]}]).error is None
    refused = run.outcome(folder, FLOAT, [])
    assert refused.error
    assert unsaid(words, refused.log) == []
