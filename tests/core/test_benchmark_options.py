"""What a comparison is made of: models, options, operators' classes, provenance. No engine is started."""

import json
import sys

import pytest

from benchmarks import compare, op_profile
from benchmarks.models import MODELS, model_folder
from lfm2_plugin.arch import Lfm2MoeArch


@pytest.mark.parametrize("name", MODELS)
def test_models_are_valid(name: str, tmp_path):
    folder, real = model_folder(name, tmp_path)
    assert not real
    arch = Lfm2MoeArch.from_config(json.loads((folder / "config.json").read_text()))
    assert arch.attention_layers
    assert len(arch.moe_layers) > 0


def test_a_cut_model_keeps_its_widths():
    for name in ("8b", "24b"):
        whole, cut = MODELS[name], MODELS[f"{name}-cut"]
        depth = {"num_hidden_layers", "layer_types"}
        assert {k: v for k, v in whole.items() if k not in depth} == {
            k: v for k, v in cut.items() if k not in depth
        }


def test_unknown_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown model '70b': choose one of 2.5-8b"):
        model_folder("70b", tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_C::cpu_fused_moe", "experts"),
        ("vllm::short_conv", "short conv"),
        ("lfm2::short_conv", "short conv"),
        ("_C::cpu_attention_with_kv_cache", "attention"),
        ("aten::linear", "linear"),
        ("_C::onednn_mm", "linear"),
        ("aten::mm", "linear"),
        ("graph_0_cpp_fused_add_mul_3", "compiled loops"),
        ("aten::argmax", "sampling"),
        ("aten::topk", "router"),
        ("aten::copy_", "other"),
    ],
)
def test_operators_have_a_class(name: str, expected: str):
    assert op_profile.op_class(name) == expected


def test_a_profile_accounts_for_the_whole_time():
    found = op_profile.summarise({"aten::mm": 6.0, "aten::linear": 1.0, "aten::copy_": 2.0}, 10.0)
    assert found["classes"] == {"linear": 7.0, "other": 2.0, "outside operators": 1.0}
    assert list(found["operators"]) == ["aten::mm", "aten::copy_", "aten::linear"]
    table = op_profile.markdown({"w": {"builtin": found, "ours": found}})
    assert "| linear | 7.0 | 7.0 |" in table
    assert "| **wall** | 10.0 | 10.0 |" in table


def _options(*arguments: str):
    return compare.parser().parse_args(arguments)


def test_both_sides_get_the_same_flags(tmp_path):
    options = _options(
        "--set", "quick", "--engine-arg", "enable-prefix-caching=false", "--threads", "3"
    )
    plan = compare.settle(options, tmp_path, True)
    assert plan.sides == plan.labels == ("builtin", "ours")
    assert plan.flags.arguments["enable_prefix_caching"] is False
    assert plan.environment["OMP_NUM_THREADS"] == "3"
    longest = max(w.context + w.steps * (plan.pairs + 1) for w in plan.workloads)
    assert plan.flags.arguments["max_model_len"] > longest


def test_a_side_against_itself_is_labelled(tmp_path):
    plan = compare.settle(_options("--a", "builtin", "--b", "builtin"), tmp_path, True)
    assert plan.labels == ("builtin (A)", "builtin (B)")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--pairs", "0"), "--pairs and --starts must be at least 1"),
        (("--only", "nothing"), "no workload"),
        (("--model", "70b"), "unknown model '70b'"),
        (("--model", "24b", "--kv-gib", "4000"), "engines need about"),
    ],
)
def test_bad_options_end_with_one_clear_line(capsys, arguments, text):
    assert compare.main([*arguments, "--no-files"]) == 1
    assert text in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("text", ["novalue", "=3"])
def test_engine_arguments_have_a_form(capsys, text):
    with pytest.raises(SystemExit):
        _options("--engine-arg", text)
    assert "is not NAME=VALUE" in capsys.readouterr().err


def test_provenance_names_the_machine_and_the_commit():
    from benchmarks.provenance import provenance

    made = provenance()
    assert made["packages"]["torch"]
    assert made["cpu"]["cpus"] >= 1
    assert made["python"] == sys.version.split()[0]
    json.dumps(made)
