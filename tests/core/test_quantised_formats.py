"""Quantised checkpoints: a config promises the tensors that compressed-tensors and llm-compressor write."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint import names
from lfm2_plugin.checkpoint.quantisation import read_plan
from lfm2_plugin.checkpoint.spellings import hub_name
from lfm2_plugin.demo import model_path
from tests.engine_common.quantised import quantised

LAYOUTS = {
    "W8A8": ("int-quantized", "W8A8 int8"),
    "W8A16": ("pack-quantized", "W8A16 int8 g128"),
    "W4A16": ("pack-quantized", "W4A16 int4 g128"),
    "W4A16_ASYM": ("pack-quantized", "W4A16 int4 g128"),
    "W4A8": ("pack-quantized", "W4A8 int4 g128"),
    "FP8": ("float-quantized", "W8A8 fp8, static activations"),
    "FP8_DYNAMIC": ("float-quantized", "W8A8 fp8"),
    "FP8_BLOCK": ("float-quantized", "W8A8 fp8 block 128x128"),
    "NVFP4": ("nvfp4-pack-quantized", "W4A4 NVFP4"),
    "NVFP4A16": ("nvfp4-pack-quantized", "W4A16 NVFP4"),
    "MXFP4A16": ("mxfp4-pack-quantized", "W4A16 MXFP4 g32"),
}
SAFETENSORS = {
    "torch.bfloat16": "BF16",
    "torch.float32": "F32",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.int8": "I8",
    "torch.int32": "I32",
    "torch.int64": "I64",
    "torch.uint8": "U8",
}


@pytest.mark.parametrize("preset", LAYOUTS)
def test_a_formats_tensors_are_those_that_compressed_tensors_writes(preset: str):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import BaseCompressor

    form, name = LAYOUTS[preset]
    scheme = quantization.preset_name_to_scheme(preset, ["Linear"])
    module = torch.nn.Linear(384, 256, bias=False, dtype=torch.bfloat16)
    quantization.initialize_module_for_quantization(module, scheme, force_zero_point=True)
    if form.startswith("nvfp4"):
        module.weight_global_scale.data.fill_(1)
    module.weight_scale.data.fill_(1)
    state = {name: value.detach() for name, value in module.state_dict().items()}
    with torch.compiler.set_stance("force_eager"):  # packing is compiled, for seconds
        written = BaseCompressor.get_value_from_registry(form).compress(state, scheme)
    dtypes = {name: SAFETENSORS[str(value.dtype)] for name, value in written.items()}

    groups = {"group_0": json.loads(scheme.model_dump_json())}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
    found = read_plan(config, ["module"]).of("module")
    assert found.name == name
    assert set(found.parameters) <= set(dtypes) <= {*found.parameters, *found.optional}
    allowed = {**found.optional, **found.parameters}
    assert not {name: dtype for name, dtype in dtypes.items() if dtype not in allowed[name]}
    shapes = {name: tuple(value.shape) for name, value in written.items()}
    assert shapes == {name: found.shapes(name, 256, 384)[0] for name in written}


MANIFEST = json.loads((Path(__file__).parent / "llm_compressor_manifest.json").read_text())
EXPERT = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def kind(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


ARCH = Lfm2MoeArch.from_config(json.loads((model_path() / "config.json").read_text()))
SIZES = {
    name.removesuffix(".weight"): shape
    for name, shape in names.expected_tensors(ARCH).items()
    if names.is_quantisable(name)
}


def linears(*, hub: bool) -> list[str]:
    """The demo model's linear modules, experts as the hub or as llm-compressor spells them."""
    found = []
    for module in SIZES:
        head, _, tail = module.rpartition(".")
        found.append(f"{head}.{EXPERT[tail] if '.experts.' in head and not hub else tail}")
    return found


@pytest.mark.parametrize("checkpoint", [name for name in MANIFEST if name != "made with"])
def test_what_llm_compressor_writes_is_what_its_config_promises(checkpoint: str):
    """The manifest of `make quantised-checkpoints`: each kind of tensor with its dtype, shape and number."""
    written = {}  # kind of tensor -> (dtype, shape, how many), of linear modules
    hub = "model.layers.*.feed_forward.experts.*.w1" in str(MANIFEST[checkpoint]["tensors"])
    modules = linears(hub=hub)
    kinds = {kind(module) for module in modules}
    for line, count in MANIFEST[checkpoint]["tensors"].items():
        name, dtype, shape = line.split(maxsplit=2)
        if name.rpartition(".")[0] in kinds:
            assert name not in written
            written[name] = (dtype, tuple(json.loads(shape)), count)
    parameters = {name.rpartition(".")[2] for name in written}
    held = [f"{m}.{p}" for m in modules for p in parameters if f"{kind(m)}.{p}" in written]

    plan = read_plan(MANIFEST[checkpoint]["quantization_config"], modules, held)
    promised: Counter[str] = Counter()
    for module in modules:
        form = plan.of(module)
        for parameter, dtypes in form.parameters.items():
            name = f"{kind(module)}.{parameter}"
            assert written[name][0] in dtypes, name
            assert written[name][1] == form.shapes(parameter, *SIZES[hub_name(module)])[0], name
            promised[name] += 1
    assert promised == {name: count for name, (_, _, count) in written.items()}
    routers = {module for module in modules if module.endswith(".feed_forward.gate")}
    with_router = checkpoint == "fp8-dynamic-router"
    assert routers <= (plan.quantised_modules if with_router else plan.plain_modules)


@pytest.mark.matrix
def test_the_manifest_is_what_llm_compressor_writes_today():
    made = json.loads((quantised("w8a8").parent / "manifest.json").read_text())
    assert made == MANIFEST
