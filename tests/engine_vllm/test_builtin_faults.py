"""Each fault of vLLM's built-in LFM2-MoE: shown in the built-in, and absent here.

``LFM2_PLUGIN=off`` brings the built-in back. Compiled, since its eager mode is one of the faults.
A test that asserts a fault fails once vLLM mends it: then the fault leaves this file and the README.
"""

import pytest
import torch

from tests.engine_common.checkpoints import altered, checkpoint
from tests.engine_common.engines import BUILTIN
from tests.engine_common.references import assert_same, cases, wrong
from tests.tolerances import assert_within

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

FLOAT = {"dtype": "float32"}
COMPILED = {**FLOAT, "enforce_eager": False, "enable_prefix_caching": False}
EAGER = {**FLOAT, "enable_prefix_caching": False}


def drafts(count: int) -> dict:
    return {
        "method": "ngram",
        "num_speculative_tokens": count,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }


def ask(name: str) -> tuple[dict, tuple]:
    """A generate step for the first prompts of a checkpoint, and their cases."""
    asked = cases(name, 40)
    return {"prompts": [c.prompt for c in asked]}, asked


def test_speculation_gives_wrong_tokens(run):
    step, asked = ask("small")
    engine = {**COMPILED, "speculative_config": drafts(3)}
    builtin = run("small", engine, [step], env=BUILTIN)
    assert builtin["metrics"]["vllm:spec_decode_num_draft_tokens"] > 0
    assert len(wrong(builtin["steps"][0], asked)) > len(asked) // 2
    ours = run("small", engine, [step])
    assert ours["metrics"]["vllm:spec_decode_num_draft_tokens"] > 0
    assert_same(ours["steps"][0], asked)


def test_eager_mode_gives_wrong_tokens(run):
    step, asked = ask("small")
    right = run("small", COMPILED, [step], env=BUILTIN)
    assert_same(right["steps"][0], asked)
    builtin = run("small", EAGER, [step], env=BUILTIN)
    long = [(o, c) for o, c in zip(builtin["steps"][0], asked, strict=True) if len(c.prompt) > 1]
    assert len(wrong([o for o, _ in long], [c for _, c in long])) > 0.9 * len(long)
    assert_same(run("small", EAGER, [step])["steps"][0], asked)


def test_state_shape_omits_draft_tokens(run):
    """Seven drafts make the state longer than the page that was sized without them."""
    step, asked = ask("narrow")
    engine = {**EAGER, "block_size": 32, "speculative_config": drafts(7)}
    builtin = run.outcome("narrow", engine, [step], env=BUILTIN)
    assert "AssertionError" in builtin.error
    assert "page_size_padded" in builtin.log
    assert_same(run("narrow", engine, [step])["steps"][0], asked)


def test_output_without_metadata_is_left_unwritten(run):
    """Shown on the layer, not through the engine: the fault is in the GPU path, which a CPU engine
    never takes."""
    step = {"op": "probe", "name": "conv_without_metadata"}
    builtin = run("small", EAGER, [step], env=BUILTIN)["steps"][0]
    assert builtin["forward_cuda"] > 0
    assert run("small", EAGER, [step])["steps"][0] == {"forward_native": 0, "forward_cuda": 0}


KV_SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "config_groups": {},
    "kv_cache_scheme": {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "symmetric": True,
        "dynamic": False,
    },
}


def test_scales_of_a_quantised_cache_are_ignored(run, tmp_path):
    def add_scales(tensors):
        tensors["model.layers.1.self_attn.k_scale"] = torch.tensor(0.25)
        tensors["model.layers.1.self_attn.v_scale"] = torch.tensor(0.5)

    config = {"quantization_config": KV_SCHEME}
    folder = altered(checkpoint("small"), tmp_path / "kv", add_scales, config)
    step = {"op": "probe", "name": "kv_scales"}
    engine = {**EAGER, "kv_cache_dtype": "fp8"}
    builtin = run.outcome(folder, engine, [step], env=BUILTIN)
    assert builtin.error or builtin.value["steps"][0] == [[1.0, 1.0]]
    assert run(folder, engine, [step])["steps"][0] == [[0.25, 0.5]]


def test_untied_head_is_served_as_tied(run):
    step, asked = ask("untied")
    builtin = run("untied", COMPILED, [step], env=BUILTIN)
    assert len(wrong(builtin["steps"][0], asked)) > len(asked) // 2
    assert_same(run("untied", COMPILED, [step])["steps"][0], asked)


def test_head_dim_is_ignored(run):
    step, asked = ask("wide_heads")
    builtin = run.outcome("wide_heads", COMPILED, [step], env=BUILTIN)
    assert builtin.error or wrong(builtin.value["steps"][0], asked)
    assert_same(run("wide_heads", COMPILED, [step])["steps"][0], asked)


def reference_routing(found: dict) -> torch.Tensor:
    """(2, A) weights of the first two rows, as transformers computes them."""
    scores = torch.tensor(found["logits"])[:2].sigmoid()
    chosen = (scores + torch.tensor(found["bias"])).topk(2, dim=-1).indices
    weights = scores.gather(1, chosen)
    return weights / (weights.sum(-1, keepdim=True) + 1e-6)


def test_routing_epsilon_and_padding_rows(run):
    """Shown on the router of the running engine: a CPU step has no padding rows."""
    step = {"op": "probe", "name": "routing"}
    builtin = run("small", EAGER, [step], env=BUILTIN)["steps"][0]
    want = reference_routing(builtin).sum(-1)
    got = torch.tensor(builtin["weights"]).sum(-1)
    assert want[1] < 0.5
    assert got[1] == pytest.approx(1.0)  # scores of 1e-7 blown up to a sum of one
    assert min(builtin["ids"][2]) >= 0  # a padding row, routed to experts
    ours = run("small", EAGER, [step])["steps"][0]
    got = torch.tensor(ours["weights"])[:2].sort(-1).values
    assert_within("router", got, reference_routing(ours).sort(-1).values)
    assert ours["ids"][2] == [-1, -1]


def test_pipeline_stage_without_an_expert_layer_is_refused(run):
    """That ours serves it is shown in ``test_parallel.py``, where the same model is cut 3,3."""
    step, _ = ask("staged")
    engine = {**COMPILED, "pipeline_parallel_size": 2}
    builtin = run.outcome("staged", engine, [step], env=BUILTIN)
    assert builtin.error
    assert "No Lfm2MoeSparseMoeBlock layer found" in builtin.log


def test_missing_expert_bias_is_left_uninitialised(run, tmp_path):
    def drop(tensors):
        (name,) = [n for n in tensors if n.endswith("expert_bias")]
        del tensors[name]

    folder = altered(checkpoint("small"), tmp_path / "no_bias", drop)
    step = {"op": "probe", "name": "expert_bias"}
    builtin = run.outcome(folder, EAGER, [step], env=BUILTIN)
    assert builtin.error is None  # it serves, with whatever was in that memory
    ours = run.outcome(folder, EAGER, [step])
    assert "feed_forward.expert_bias" in ours.error


def test_every_prompt_takes_two_steps_with_prefix_caching(run):
    asked = [c for c in cases("alpha") if len(c.prompt) in (129, 257, 1000)]
    steps = [{"prompts": [c.prompt for c in asked], "alone": True, "params": {"max_tokens": 1}}]
    engine = {**FLOAT, "enable_prefix_caching": True}
    builtin = run("alpha", engine, steps, env=BUILTIN)
    ours = run("alpha", engine, steps)
    assert len(asked) > 4
    assert len(builtin["scheduled"]) == 2 * len(asked)
    assert len(ours["scheduled"]) == len(asked)


def test_conv_pages_are_padded(run):
    """Alpha has five conv layers for one attention layer: five pages a sequence, or one."""
    step = {"op": "kv_groups"}
    engine = {**FLOAT, "enable_prefix_caching": False}

    def conv_bytes(groups: list[dict]) -> tuple[int, int]:
        mamba = [g for g in groups if g["kind"] == "MambaSpec"]
        return len(mamba), sum(g["layers"] * g["page"] for g in mamba)

    builtin = conv_bytes(run("alpha", engine, [step], env=BUILTIN)["steps"][0])
    ours = conv_bytes(run("alpha", engine, [step])["steps"][0])
    needed = 5 * 2 * 128 * 4  # layers, K-1, D, bytes
    assert builtin[0] == 5
    assert builtin[1] > 4 * needed
    assert ours[0] == 1
    assert ours[1] * 5 == builtin[1]
