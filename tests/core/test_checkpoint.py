from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import (
    CheckpointError,
    CheckpointReport,
    StreamCheck,
    Target,
    check_checkpoint,
    expected_tensors,
    inspect_safetensors,
    translate,
)
from lfm2_plugin.checkpoint.names import LAYER, TOP
from tests import tiny

CONFIGS = {"default": {}, "wide-heads": tiny.WIDE_HEADS, "untied": tiny.UNTIED}
EXPERT = "model.layers.2.feed_forward.experts.5.w1.weight"
BIAS = "model.layers.3.feed_forward.expert_bias"


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The default checkpoint as name -> tensor; tests change copies of it."""
    folder = tiny.make_checkpoint(tmp_path_factory.mktemp("whole"))
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def arch() -> Lfm2MoeArch:
    return Lfm2MoeArch.from_config(tiny.make_config())


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_table_is_what_transformers_saves(tmp_path: Path, overrides: dict) -> None:
    folder = tiny.make_checkpoint(tmp_path, **overrides)
    arch = Lfm2MoeArch.from_config(json.loads((folder / "config.json").read_text()))
    found = inspect_safetensors(folder)
    assert {name: shape for name, (_, shape) in found.items()} == expected_tensors(arch)
    assert {dtype for dtype, _ in found.values()} == {"F32"}
    check_checkpoint(arch, folder)


def test_stacked_names_are_those_in_memory(arch: Lfm2MoeArch) -> None:
    held = {name: tuple(t.shape) for name, t in tiny.make_model().state_dict().items()}
    del held["lm_head.weight"]  # tied
    assert expected_tensors(arch, stacked=True) == held


def test_sharded(tmp_path: Path, arch: Lfm2MoeArch) -> None:
    folder = tiny.make_checkpoint(tmp_path, max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert inspect_safetensors(folder).keys() == expected_tensors(arch).keys()
    check_checkpoint(arch, folder)


def test_index_decides_which_files_count(tmp_path: Path, arch: Lfm2MoeArch) -> None:
    """Some repositories ship the weights a second time, under another name."""
    folder = tiny.make_checkpoint(tmp_path, max_shard_size="300KB")
    save_file({"tok_embeddings.weight": torch.zeros(1)}, folder / "consolidated.safetensors")
    check_checkpoint(arch, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({EXPERT: None}, f"1 missing: {EXPERT}"),
        ({BIAS: None}, f"1 missing: {BIAS}"),
        ({"model.layers.2.extra.weight": (3,)}, "1 unexpected: model.layers.2.extra.weight"),
        ({"model.layers.2.self_attn.q_proj.bias": (128,)}, "1 unexpected: .*q_proj.bias"),
        ({"model.layers.0.conv.in_proj.bias": (384,)}, "1 unexpected: .*in_proj.bias"),
        ({"model.layers.0.self_attn.q_proj.weight": (128, 128)}, "1 unexpected: .*0.self_attn"),
        ({"model.layers.2.feed_forward.experts.8.w1.weight": (64, 128)}, r"unexpected: .*\.8\.w1"),
        ({EXPERT: (128, 64)}, rf"1 of another shape: {EXPERT} is \[128, 64\], not \[64, 128\]"),
        ({"model.layers.1.conv.conv.weight": (128, 3)}, r"is \[128, 3\], not \[128, 1, 3\]"),
    ],
    ids=[
        "expert-missing", "bias-missing", "extra", "attention-bias", "conv-bias", "layer-kind",
        "expert-too-many", "transposed", "conv-without-middle-dim",
    ],
)  # fmt: skip
def test_wrong_tensors(tmp_path: Path, tensors: dict, arch, change: dict, message: str) -> None:
    changed = {name: shape and torch.zeros(shape) for name, shape in change.items()}
    merged = {name: t for name, t in {**tensors, **changed}.items() if t is not None}
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(arch, save(tmp_path, merged))


def test_all_that_is_wrong_is_listed(tmp_path: Path, tensors: dict, arch: Lfm2MoeArch) -> None:
    changed = {name: t for name, t in tensors.items() if ".experts." not in name}
    changed["model.embedding_norm.weight"] = torch.zeros(1)
    changed["model.norm.weight"] = torch.zeros(128)
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(arch, save(tmp_path, changed))
    report = caught.value.report
    assert len(report.missing) == 6 * 8 * 3
    assert report.unexpected == ["model.norm.weight"]
    assert report.wrong_shape == {"model.embedding_norm.weight": ((1,), (128,))}
    text = str(caught.value)
    assert "144 missing" in text
    assert "143 more like model.layers.*.feed_forward.experts.*.w*.weight" in text
    assert len(text) < 1000


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("present", [True, False], ids=["with-head", "without-head"])
def test_head(tmp_path: Path, tensors: dict, arch: Lfm2MoeArch, tied: bool, present: bool) -> None:
    """A tied model may ship the copy; an untied one must ship its own head."""
    head = {"lm_head.weight": torch.zeros(512, 128)} if present else {}
    folder = save(tmp_path, {**tensors, **head})
    arch = replace(arch, tie_word_embeddings=tied)
    if present or tied:
        check_checkpoint(arch, folder)
    else:
        with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight"):
            check_checkpoint(arch, folder)


def stack(tensors: dict[str, torch.Tensor], arch: Lfm2MoeArch) -> dict[str, torch.Tensor]:
    stacked = {name: t for name, t in tensors.items() if ".experts." not in name}
    for layer in arch.moe_layers:
        prefix = f"model.layers.{layer}.feed_forward.experts."
        w1, w2, w3 = (
            torch.stack([tensors[f"{prefix}{e}.{w}.weight"] for e in range(arch.num_experts)])
            for w in ("w1", "w2", "w3")
        )
        stacked[prefix + "gate_up_proj"] = torch.cat([w1, w3], dim=1)
        stacked[prefix + "down_proj"] = w2
    return stacked


def test_stacked_experts(tmp_path: Path, tensors: dict, arch: Lfm2MoeArch) -> None:
    stacked = stack(tensors, arch)
    check_checkpoint(arch, save(tmp_path, stacked))
    del stacked["model.layers.4.feed_forward.experts.down_proj"]
    with pytest.raises(CheckpointError, match=r"8 missing: .*layers\.4.*experts\.0\.w2"):
        check_checkpoint(arch, save(tmp_path, stacked))


def test_rotary_table_of_old_versions(tmp_path: Path, tensors: dict, arch: Lfm2MoeArch) -> None:
    check_checkpoint(arch, save(tmp_path, {**tensors, "model.pos_emb.inv_freq": torch.zeros(16)}))


QUANTISED = {
    "fp8": {"weight": (), "weight_scale": ()},
    "fp8-block": {"weight": (), "weight_scale_inv": ()},
    "fp8-static": {"weight": (), "weight_scale": (), "input_scale": ()},
    "pack-quantized": {
        "weight_packed": (), "weight_scale": (), "weight_zero_point": (), "weight_shape": (),
    },
    "nvfp4": {
        "weight": (), "weight_scale": (), "weight_scale_2": (), "input_scale": (),
    },
    "nvfp4-pack": {
        "weight_packed": (), "weight_scale": (), "weight_global_scale": (),
        "input_global_scale": (),
    },
    "awq": {"qweight": (), "qzeros": (), "scales": ()},
    "gptq": {"qweight": (), "qzeros": (), "scales": (), "g_idx": ()},
}  # fmt: skip
LINEAR = re.compile(r"(_proj|experts\.\d+\.w\d|feed_forward\.w\d)\.weight$")


def quantise(tensors: dict[str, torch.Tensor], parameters: dict) -> dict[str, torch.Tensor]:
    """Every matmul but the router in another form; the values do not matter here."""
    result = {}
    for name, tensor in tensors.items():
        if LINEAR.search(name):
            module = name.removesuffix(".weight")
            result |= {f"{module}.{p}": torch.zeros(2, 3) for p in parameters}
        else:
            result[name] = tensor
    return result


@pytest.mark.parametrize("parameters", QUANTISED.values(), ids=QUANTISED)
def test_quantised(tmp_path: Path, tensors: dict, arch: Lfm2MoeArch, parameters: dict) -> None:
    quantised = quantise(tensors, parameters)
    for kv in ("k_scale", "v_proj.v_scale", "attn.q_scale", "k_proj.output_scale"):
        quantised[f"model.layers.2.self_attn.{kv}"] = torch.zeros(1)
    folder = save(tmp_path, quantised)
    check_checkpoint(arch, folder, quantised=True)
    with pytest.raises(CheckpointError, match=r"unexpected|another shape"):
        check_checkpoint(arch, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({BIAS: None}, f"1 missing: {BIAS}"),
        ({EXPERT[:-6] + "qweight": None}, f"1 missing: {EXPERT}"),
        ({EXPERT[:-6] + "scales": None}, rf"1 missing: {EXPERT[:-6]}scales"),
        ({"model.layers.0.conv.conv.qweight": (1,)}, "1 unexpected: .*conv.conv.qweight"),
        ({"model.layers.0.operator_norm.scales": (1,)}, "1 unexpected: .*operator_norm.scales"),
        ({"model.layers.0.operator_norm.weight": (1,)}, r"is \[1\], not \[128\]"),
        ({"model.layers.0.conv.in_proj.strange": (1,)}, "1 unexpected: .*strange"),
    ],
    ids=["bias", "weight", "scales", "conv", "norm", "norm-shape", "unknown-parameter"],
)
def test_quantised_and_wrong(tmp_path: Path, tensors, arch, change: dict, message: str) -> None:
    quantised = quantise(tensors, QUANTISED["gptq"])
    quantised |= {name: shape and torch.zeros(shape) for name, shape in change.items()}
    kept = {name: t for name, t in quantised.items() if t is not None}
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(arch, save(tmp_path, kept), quantised=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], r"model.safetensors: \d+ bytes where .* \(truncated\)"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:200], "truncated in its header"),
        (lambda data: data[:5], "truncated in its header"),
        (lambda data: b"", "truncated in its header"),
        (lambda data: data + b"x", "bytes where its header says"),
        (lambda data: data[:8] + b"#" + data[9:], "corrupt header"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "not safetensors"),
    ],
    ids=["last-byte", "half", "in-header", "in-length", "empty", "tail", "bad-json", "lfs-pointer"],
)
def test_damaged_file(tmp_path: Path, tensors: dict, arch, damage, message: str) -> None:
    file = save(tmp_path, tensors) / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(arch, tmp_path)


def test_damaged_shards_are_all_named(tmp_path: Path, arch: Lfm2MoeArch) -> None:
    folder = tiny.make_checkpoint(tmp_path, max_shard_size="300KB")
    first, second, third, *_ = sorted(folder.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-7])
    name, *rest = load_file(third).items()
    save_file(dict(rest), third)
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(arch, folder)
    text = str(caught.value)
    assert f"{first.name}: not there" in text
    assert f"{second.name}: " in text
    assert f"{third.name}: lacks {name[0]}" in text


def test_same_tensor_twice(tmp_path: Path, tensors: dict, arch: Lfm2MoeArch) -> None:
    save(tmp_path, tensors)
    save_file({EXPERT: tensors[EXPERT]}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=rf"a second {EXPERT}"):
        check_checkpoint(arch, tmp_path)


def test_folder_without_weights(tmp_path: Path, arch: Lfm2MoeArch) -> None:
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        check_checkpoint(arch, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}'])
def test_bad_index(tmp_path: Path, tensors: dict, text: str) -> None:
    save(tmp_path, tensors)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="not an index"):
        inspect_safetensors(tmp_path)


def feed(check: StreamCheck, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        check.see(name, tensor.shape)


def test_stream(tensors: dict, arch: Lfm2MoeArch) -> None:
    check = StreamCheck(arch)
    feed(check, tensors)
    check.finish()
    with pytest.raises(CheckpointError, match=r"1 unexpected: model\.norm\.weight"):
        check.see("model.norm.weight", (128,))
    with pytest.raises(CheckpointError, match="1 of another shape"):
        check.see(EXPERT, (1, 1))


def test_stream_that_lacks_something(tensors: dict, arch: Lfm2MoeArch) -> None:
    check = StreamCheck(arch)
    feed(check, {name: t for name, t in tensors.items() if name not in (EXPERT, BIAS)})
    with pytest.raises(CheckpointError, match="2 missing"):
        check.finish()
    with pytest.raises(CheckpointError, match=f"1 missing: {BIAS}"):
        check.finish(all_experts=False)


def test_empty_report_is_no_error() -> None:
    CheckpointReport().raise_if_bad()


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("model.embed_tokens.weight", Target(None, "embed_tokens", "weight")),
        ("lm_head.weight", Target(None, "lm_head", "weight")),
        ("model.layers.11.ffn_norm.weight", Target(11, "ffn_norm", "weight")),
        ("model.layers.2.self_attn.k_proj.weight_packed",
         Target(2, "self_attn.qkv_proj", "weight_packed", "k")),
        ("model.layers.2.self_attn.out_proj.weight", Target(2, "self_attn.out_proj", "weight")),
        ("model.layers.2.self_attn.v_proj.v_scale", Target(2, "self_attn.scales", "v_scale", "v")),
        ("model.layers.2.self_attn.k_scale", Target(2, "self_attn.scales", "k_scale", "k")),
        ("model.layers.0.conv.conv.bias", Target(0, "conv.conv", "bias")),
        ("model.layers.0.feed_forward.w3.weight", Target(0, "feed_forward.w13", "weight", 1)),
        (BIAS, Target(3, "feed_forward.expert_bias", "weight")),
        (EXPERT, Target(2, "feed_forward.experts", "weight", "w1", 5)),
        (EXPERT[:-6] + "scales", Target(2, "feed_forward.experts", "scales", "w1", 5)),
        ("model.layers.2.feed_forward.experts.gate_up_proj",
         Target(2, "feed_forward.experts", "weight", "w13")),
        ("model.layers.2.feed_forward.experts.down_proj",
         Target(2, "feed_forward.experts", "weight", "w2")),
        ("model.norm.weight", None),
        ("lm_head", None),
        ("ffn_norm.weight", None),
        ("model.layers.2.lm_head.weight", None),
        ("model.layers.2.feed_forward.experts.w1.weight", None),
        ("model.layers.2.feed_forward.experts.5.weight", None),
        ("model.layers.2.operator_norm.scales", None),
        ("model.layers.2.self_attn.q_proj.bias", None),
        ("model.layers.x.ffn_norm.weight", None),
    ],
)  # fmt: skip
def test_translate(name: str, target: Target | None) -> None:
    assert translate(name) == target


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("stacked", [False, True])
def test_every_expected_name_has_its_own_target(overrides: dict, stacked: bool) -> None:
    arch = Lfm2MoeArch.from_config(tiny.make_config(**overrides))
    targets = [translate(name) for name in expected_tensors(arch, stacked=stacked)]
    assert None not in targets
    assert len(set(targets)) == len(targets)


def test_table_has_no_row_twice() -> None:
    sources = [row.source for row in (*TOP, *LAYER)]
    assert len(set(sources)) == len(sources)
