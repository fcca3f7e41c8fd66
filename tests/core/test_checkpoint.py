from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import (
    CheckpointError,
    CheckpointReport,
    Ledger,
    Target,
    check_checkpoint,
    expected_tensors,
    inspect_files,
    translate,
)
from lfm2_plugin.checkpoint.names import KV_SCALES, LAYER, TOP
from lfm2_plugin.checkpoint.placement import Place, place
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
    found = inspect_files(folder)
    assert {name: header.shape for name, header in found.items()} == expected_tensors(arch)
    assert {header.dtype for header in found.values()} == {"F32"}
    check_checkpoint(arch, folder)


def test_stacked_names_are_those_in_memory(arch: Lfm2MoeArch) -> None:
    held = {name: tuple(t.shape) for name, t in tiny.make_model().state_dict().items()}
    del held["lm_head.weight"]  # tied
    assert expected_tensors(arch, stacked=True) == held


def test_sharded(tmp_path: Path, arch: Lfm2MoeArch) -> None:
    folder = tiny.make_checkpoint(tmp_path, max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert inspect_files(folder).keys() == expected_tensors(arch).keys()
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
        ({"model.layers.1.conv.conv.weight": (128, 4)}, r"is \[128, 4\], not \[128, 1, 3\]"),
    ],
    ids=[
        "expert-missing", "bias-missing", "extra", "attention-bias", "conv-bias", "layer-kind",
        "expert-too-many", "transposed", "conv-width",
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
    assert report.unexpected == {"model.norm.weight": ""}
    assert report.wrong_shape == {"model.embedding_norm.weight": ((1,), "[128]")}
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
        inspect_files(tmp_path)


def feed(ledger: Ledger, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What comes out of a ledger, all of it settled."""
    pieces = {n: p for name, t in tensors.items() for n, p in ledger.enter(name, t)}
    for name in pieces:
        ledger.settle(name)
    return pieces


def test_stream(tensors: dict, arch: Lfm2MoeArch) -> None:
    ledger = Ledger(arch)
    assert feed(ledger, tensors).keys() == tensors.keys()
    ledger.close()
    ledger.finish()
    with pytest.raises(CheckpointError, match=r"1 unexpected: model\.norm\.weight"):
        ledger.enter("model.norm.weight", torch.zeros(128))
    with pytest.raises(CheckpointError, match="1 of another shape"):
        ledger.enter(EXPERT, torch.zeros(1, 1))
    with pytest.raises(CheckpointError, match=f"1 that came twice: {EXPERT}"):
        ledger.enter(EXPERT, tensors[EXPERT])


def test_stream_that_lacks_something(tensors: dict, arch: Lfm2MoeArch) -> None:
    ledger = Ledger(arch)
    feed(ledger, {name: t for name, t in tensors.items() if name not in (EXPERT, BIAS)})
    with pytest.raises(CheckpointError, match="2 missing"):
        ledger.finish()
    with pytest.raises(CheckpointError, match=f"1 missing: {BIAS}"):
        ledger.finish(all_experts=False)


def test_a_tensor_that_went_nowhere(tensors: dict, arch: Lfm2MoeArch) -> None:
    ledger = Ledger(arch)
    ledger.enter(BIAS, tensors[BIAS])
    with pytest.raises(CheckpointError, match=f"1 without a place in the engine's model: {BIAS}"):
        ledger.close()


def test_a_parameter_that_stayed_empty(tensors: dict, arch: Lfm2MoeArch) -> None:
    ledger = Ledger(arch)
    feed(ledger, tensors)
    with pytest.raises(
        CheckpointError, match=r"1 of the engine's model that nothing.*: some\.scale"
    ):
        ledger.finish(["some.scale"])


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
        ("model.layers.2.self_attn.v_proj.v_scale", Target(2, "self_attn.scales", "v_scale")),
        ("model.layers.2.self_attn.k_scale", Target(2, "self_attn.scales", "k_scale")),
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


@pytest.mark.parametrize("name", sorted(KV_SCALES))
def test_a_scale_of_a_cache_is_no_part_of_a_fused_matrix(name: str):
    """Its parameter's loader takes the scale alone: whichever of its names it has in the file."""
    where = place(f"model.layers.2.{name}", {"self_attn.scales": "self_attn.attn"})
    kind = name.rpartition(".")[2].replace("output", name[len("self_attn.")]).replace("kv_", "k_")
    assert where == Place(2, f"model.layers.2.self_attn.attn.{kind}", None, None)
