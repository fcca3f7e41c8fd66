"""Configs, headers, names and adapters that are a little wrong: read right or refused in words, whatever the mistake.

"Refused in words" is one of our own errors, which have a text. Anything else that is raised, a hang or a list without
bound is a fault.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lfm2_plugin.arch import Lfm2MoeArch, UnsupportedConfig
from lfm2_plugin.checkpoint import (
    AdapterConfig,
    AdapterError,
    CheckpointError,
    UnsupportedQuantisation,
    check_checkpoint,
    read_adapter,
    unified,
)
from lfm2_plugin.checkpoint.adapter_config import MOST_RANK
from lfm2_plugin.checkpoint.names import expected_tensors
from lfm2_plugin.reference import ReferenceModel
from tests import tiny
from tests.engine_common.int8_weights import W8A8
from tests.tiers import matrix

SHAPE = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
EXAMPLES = [70, matrix(700)]
PROMPT = [3, 5, 8, 13]

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10),
    st.sampled_from([2**31, 2**63, 10**9, -(10**9)]),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.one_of(st.integers(-1, 3), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(-1, 3), max_size=2),
)


def many(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many cases, the same in every run."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_checkpoint(tmp_path_factory.mktemp("whole"), **SHAPE)


@pytest.fixture(scope="module")
def answer(folder: Path) -> list[int]:
    return ReferenceModel.from_folder(folder).generate(PROMPT, 3)


@st.composite
def changed_config(draw: st.DrawFn, config: dict[str, Any]) -> dict[str, Any]:
    """A config with one or two entries dropped, renamed, or of another type or value."""
    config = json.loads(json.dumps(config))
    for _ in range(draw(st.integers(1, 2))):
        place = config
        key = draw(st.sampled_from(sorted(config)))
        if isinstance(config[key], dict) and config[key] and draw(st.booleans()):
            place = config[key]
            key = draw(st.sampled_from(sorted(place)))
        match draw(st.sampled_from(["drop", "rename", "odd", "odd", "odd"])):
            case "drop":
                del place[key]
            case "rename":
                place[draw(st.sampled_from(["x", "num_experts_", key.upper(), "hidden_act"]))] = (
                    place.pop(key)
                )
            case _:
                place[key] = draw(ODD)
        if not config:
            break
    return config


@pytest.mark.parametrize("examples", EXAMPLES)
def test_configs(folder: Path, examples: int) -> None:
    config = json.loads((folder / "config.json").read_text())

    @many(examples)
    @given(changed_config(config))
    def check(changed: dict[str, Any]) -> None:
        try:
            arch = Lfm2MoeArch.from_config(changed)
        except UnsupportedConfig:
            return
        assert expected_tensors(arch)
        with suppress(CheckpointError):
            check_checkpoint(arch, folder)

    check()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_quantisation_configs(folder: Path, examples: int) -> None:
    """The files are unquantised, so only a config that quantises nothing may pass."""
    arch = Lfm2MoeArch.from_config(json.loads((folder / "config.json").read_text()))

    @many(examples)
    @given(changed_config({**W8A8, "ignore": ["lm_head"], "kv_cache_scheme": None}))
    def check(changed: dict[str, Any]) -> None:
        try:
            plan = check_checkpoint(arch, folder, changed)
        except (CheckpointError, UnsupportedQuantisation):
            return
        assert not plan.quantised_modules

    check()


@pytest.mark.parametrize(
    ("name", "value"), [("num_experts", 10**9), ("vocab_size", 2**62), ("hidden_size", 2**40)]
)
def test_sizes_without_bound(folder: Path, name: str, value: int) -> None:
    """Nothing of that size is listed or allocated; in a process that may take little memory it would end it."""
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises((UnsupportedConfig, CheckpointError)) as caught:
        check_checkpoint(Lfm2MoeArch.from_config({**config, name: value}), folder)
    assert str(value) in str(caught.value)


@st.composite
def changed_header(draw: st.DrawFn, header: dict[str, Any]) -> dict[str, Any] | bytes:
    """A header with one entry dropped, renamed, or with another dtype, shape or place; or bytes that are none."""
    header = json.loads(json.dumps(header))
    name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    match draw(st.sampled_from(["drop", "rename", "dtype", "shape", "place", "odd", "bytes"])):
        case "drop":
            del header[name]
        case "rename":
            new = [
                name.replace("w1", "gate_proj"), name.replace("w3", "w1"), name.removeprefix("model."), f"{name}_scale",
                name.replace("layers.1", "layers.0"), name.replace("weight", "weight_packed"),
                draw(st.text(max_size=9)),
            ]  # fmt: skip
            header[draw(st.sampled_from(new))] = header.pop(name)
        case "dtype":
            header[name]["dtype"] = draw(
                st.one_of(st.sampled_from(["I32", "U8", "F4", "F16"]), ODD)
            )
        case "shape":
            shape = header[name]["shape"]
            new = [shape[::-1], [1, *shape], shape[:-1], [-1, *shape], [n * 2 for n in shape]]
            header[name]["shape"] = draw(st.one_of(st.sampled_from(new), ODD))
        case "place":
            first, last = header[name]["data_offsets"]
            new = [[last, first], [first + 4, last + 4], [0, last], [first], [str(first), last]]
            header[name]["data_offsets"] = draw(st.one_of(st.sampled_from(new), ODD))
        case "odd":
            header[name] = draw(ODD)
        case _:
            return draw(st.binary(max_size=40))
    return header


@pytest.mark.parametrize("examples", EXAMPLES)
def test_headers(folder: Path, answer: list[int], tmp_path: Path, examples: int) -> None:
    """What passes gives the same tokens: the data is the same, and no name stands for another tensor."""
    arch = Lfm2MoeArch.from_config(json.loads((folder / "config.json").read_text()))
    whole = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    passed = 0

    expert = "model.layers.1.feed_forward.experts.5"
    served = {n.replace(f"{expert}.w2", f"{expert}.down_proj"): e for n, e in header.items()}

    @many(examples)
    @given(changed_header(header))
    @example(served)
    def check(changed: dict[str, Any] | bytes) -> None:
        nonlocal passed
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        file = tmp_path / "model.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text + data)
        try:
            check_checkpoint(arch, tmp_path)
        except CheckpointError:
            return
        load_file(file)  # safetensors' own reader takes what ours takes
        assert ReferenceModel.from_folder(tmp_path).generate(PROMPT, 3) == answer
        passed += 1

    check()
    assert passed


QUERY = "base_model.model.model.layers.1.self_attn.q_proj"
STACK = "base_model.model.model.layers.1.feed_forward.experts"


def factors(arch: Lfm2MoeArch, rank: int) -> dict[str, torch.Tensor]:
    """An adapter on a projection and on the stack of the experts' w2."""
    width, hidden = arch.moe_intermediate_size, arch.hidden_size
    experts = arch.num_experts
    return {
        f"{QUERY}.lora_A.weight": torch.ones(rank, hidden),
        f"{QUERY}.lora_B.weight": torch.ones(arch.num_heads * arch.head_dim, rank),
        f"{STACK}.lora_A.weight": torch.ones(experts * rank, width),
        f"{STACK}.lora_B.weight": torch.ones(hidden, rank * experts),
    }


@st.composite
def changed_tensors(draw: st.DrawFn, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One tensor dropped, renamed, of another shape or dtype; or none."""
    tensors = dict(tensors)
    name = draw(st.sampled_from(sorted(tensors)))
    match draw(st.sampled_from(["none", "drop", "rename", "shape", "dtype"])):
        case "drop":
            del tensors[name]
        case "rename":
            new = [
                name.replace("q_proj", "gate"),
                name.replace("layers.1", "layers.7"),
                f"{name}.x",
            ]
            tensors[draw(st.sampled_from([*new, name.replace("lora_A", "lora_B")]))] = tensors.pop(
                name
            )
        case "shape":
            tensor = tensors[name]
            tensors[name] = draw(
                st.sampled_from([tensor.t(), tensor[1:], tensor[None], tensor[:0]])
            )
        case "dtype":
            dtype = draw(st.sampled_from([torch.int8, torch.float8_e4m3fn, torch.float64]))
            tensors[name] = tensors[name].to(dtype)
    return tensors


@pytest.mark.parametrize("examples", EXAMPLES)
def test_adapters(folder: Path, examples: int) -> None:
    """What passes is of the model's shapes, and as large as its largest rank makes it at most."""
    arch = Lfm2MoeArch.from_config(json.loads((folder / "config.json").read_text()))
    whole = factors(arch, 4)
    told = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "use_dora": False, "bias": "none",
        "rank_pattern": {}, "alpha_pattern": {"q_proj": 16}, "modules_to_save": None, "peft_version": "0.19.0",
    }  # fmt: skip
    passed = 0

    @many(examples)
    @given(changed_config(told), changed_tensors(whole))
    @example({**told, "rank_pattern": {"v_proj": 10**9}}, whole)
    @example(told, whole)
    def check(changed: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        nonlocal passed
        try:
            config = AdapterConfig.from_dict(changed)
            parts = unified(arch, config, read_adapter(arch, config, tensors))
        except AdapterError:
            return
        numbers = sum(part.a.numel() + part.b.numel() for part in parts)
        assert numbers <= MOST_RANK / 4 * sum(tensor.numel() for tensor in whole.values())
        assert all(part.scaling == 1 and math.isfinite(float(part.b.sum())) for part in parts)
        passed += 1

    check()
    assert passed
