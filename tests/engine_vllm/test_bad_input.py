"""Bad input through the real engine start: one clear error, before any long work.

"Before long work": before the KV cache is allocated and the model is warmed up, which the log would
show.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import altered, checkpoint

pytestmark = pytest.mark.engine

ENGINE = {"dtype": "float32", "enable_prefix_caching": False}
LONG_WORK = ("Loading weights took", "Warming up", "KV cache size")


def refused(run, model, engine=None, **options) -> str:
    """What the user reads when the engine doesn't start: the error and the log."""
    outcome = run.outcome(model, {**ENGINE, **(engine or {})}, [], **options)
    assert outcome.error is not None, "the engine started"
    text = f"{outcome.error}\n{outcome.log}"
    assert not [mark for mark in LONG_WORK if mark in text]
    return text


def with_config(folder: Path, **changes) -> Path:
    return altered(checkpoint("small"), folder, config=changes)


@pytest.fixture
def where(tmp_path) -> Path:
    return tmp_path / "model"


def test_config_of_another_model(run, where):
    """Another model's config that says it is ours: what a wrongly edited folder looks like."""
    config = {"model_type": "lfm2", "architectures": ["Lfm2MoeForCausalLM"]}
    text = refused(run, with_config(where, **config))
    assert "model_type 'lfm2'" in text
    assert "serves only 'lfm2_moe'" in text


def test_layer_types_that_do_not_match(run, where):
    """Transformers' own check of the config speaks first."""
    text = refused(run, with_config(where, layer_types=["conv", "full_attention", "conv"]))
    assert "`num_hidden_layers` (2) must be equal to the number of `layer_types` (3)" in text


def test_unknown_layer_type(run, where):
    text = refused(run, with_config(where, layer_types=["conv", "sliding_attention"]))
    assert "sliding_attention" in text
    assert "known are conv and full_attention" in text


def test_experts_that_can_not_be_divided(run, where):
    def seventh(tensors):
        for name in [n for n in tensors if ".experts.3." in n]:
            del tensors[name]
        for name in [n for n in tensors if n.endswith(("gate.weight", "expert_bias"))]:
            tensors[name] = tensors[name][:3].clone()

    folder = altered(checkpoint("small"), where, seventh, {"num_experts": 3})
    engine = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    text = refused(run, folder, engine)
    assert "3 experts can't be divided evenly over 2 expert-parallel ranks" in text


def test_heads_that_can_not_be_divided(run):
    text = refused(run, "small", {"tensor_parallel_size": 3})
    assert "--tensor-parallel-size 3" in text or "tensor parallel size (3)" in text


def test_missing_tensors_are_all_named(run, where):
    gone = ["model.layers.0.conv.conv.weight", "model.layers.1.self_attn.q_proj.weight"]

    def drop(tensors):
        for name in gone:
            del tensors[name]

    text = refused(run, altered(checkpoint("small"), where, drop))
    assert "CheckpointError" in text
    assert all(name in text for name in gone)


def test_missing_expert(run, where):
    def drop(tensors):
        del tensors["model.layers.1.feed_forward.experts.2.w3.weight"]

    text = refused(run, altered(checkpoint("small"), where, drop))
    assert "model.layers.1.feed_forward.experts.2.w3.weight" in text


def test_extra_tensor(run, where):
    def add(tensors):
        tensors["model.layers.0.conv.gate.weight"] = torch.zeros(4)

    text = refused(run, altered(checkpoint("small"), where, add))
    assert "model.layers.0.conv.gate.weight" in text


def test_wrong_shape(run, where):
    def cut(tensors):
        name = "model.layers.0.feed_forward.w2.weight"
        tensors[name] = tensors[name][:, :-32].clone()

    text = refused(run, altered(checkpoint("small"), where, cut))
    assert "model.layers.0.feed_forward.w2.weight" in text
    assert "[128, 224]" in text
    assert "[128, 256]" in text


def test_truncated_file(run, where):
    shutil.copytree(checkpoint("small"), where)
    (file,) = where.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    text = refused(run, where)
    assert file.name in text
    assert "truncated" in text


def test_missing_shard(run, where):
    """The index names a file that isn't there, as after a download that was cut off."""
    shutil.copytree(checkpoint("small"), where)
    (file,) = where.glob("*.safetensors")
    names = ["model.embed_tokens.weight", "model.embedding_norm.weight"]
    index = {name: file.name for name in names} | {
        "model.layers.1.ffn_norm.weight": "model-00002-of-00002.safetensors"
    }
    (where / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    text = refused(run, where)
    assert "model-00002-of-00002.safetensors" in text


@pytest.mark.parametrize("method", ["fp8", "experts_int8"])
def test_unsupported_quantisation(run, method):
    """A method that vLLM knows and has no kernels for on a CPU without AMX."""
    text = refused(run, "small", {"dtype": "bfloat16", "quantization": method})
    assert "vLLM has no kernel for experts quantised by" in text
    assert "Serve the unquantised checkpoint" in text


def test_unknown_quantisation(run, where):
    text = refused(run, with_config(where, quantization_config={"quant_method": "shrink9000"}))
    assert "shrink9000" in text


def test_speculation_with_prefix_caching_on_a_cpu(run):
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    engine = {"enable_prefix_caching": True, "speculative_config": drafts}
    assert "--no-enable-prefix-caching" in refused(run, "small", engine)


def test_a_wrong_switch(run):
    text = refused(run, "small", env={"LFM2_PLUGIN": "maybe"})
    assert "LFM2_PLUGIN='maybe' is not understood" in text
