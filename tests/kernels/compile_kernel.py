"""Compile a kernel for a GPU that isn't here, and count what a reader of its machine code would look for.

Run as a program, since a process has kernels either interpreted or compiled::

    python tests/kernels/compile_kernel.py short_conv '{"name": {"K": 3, ...}}' cuda 90

prints {"name": {"loads": .., "wide_loads": .., "stores": .., "wide_stores": .., "registers": .., "spilled": ..}}; of a
GPU that is not NVIDIA's, whether it compiles.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

KERNELS = {
    "short_conv": "_short_conv",
    "short_conv_drafts": "_short_conv_drafts",
    "router": "_route",
}
VALUES = (
    "bcx_ptr",
    "weight_ptr",
    "bias_ptr",
    "state_ptr",
    "windows_ptr",
    "out_ptr",
    "logits_ptr",
)
POINTERS = dict.fromkeys(VALUES, "*bf16") | {
    "weights_ptr": "*fp32",
    "ids_ptr": "*i32",
    "padding_ptr": "*i1",
    "slots_ptr": "*i32",
    "seen_ptr": "*i64",
    "query_start_ptr": "*i32",
    "has_state_ptr": "*i1",
    "accepted_ptr": "*i32",
    "checkpoint_offsets_ptr": "*i32",
    "checkpoint_slots_ptr": "*i32",
}
FLOATS = {"scaling": "fp32", "epsilon": "fp32"}
BY_16 = (
    "logits_stride",
    "D",
    "bcx_stride",
    "weight_stride_tap",
    "out_stride_row",
    "state_stride_slot",
)
BY_16 += ("state_stride_column", "windows_stride_sequence", "windows_stride_draft")
"""Integers that 16 divides in the published models, which Triton sees at the launch."""


def count(kernel: object, arch: int) -> dict:
    """Figures of an NVIDIA GPU's code."""
    from triton.backends.nvidia.compiler import get_ptxas

    text = kernel.asm["ptx"]
    target = re.search(r"^\.target (\w+)", text, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(text)
        command = [
            get_ptxas(arch).path,
            "-v",
            f"-arch={target}",
            source,
            "-o",
            Path(folder) / "cubin",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "loads": len(re.findall(r"ld\.global", text)),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", text)),
        "stores": len(re.findall(r"st\.global", text)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", text)),
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", said)[1]),
    }


def build(function: object, constants: dict, backend: str, arch: int | str) -> object:
    """The kernel with these constants, 16-bit floats, and every other argument as at a launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = function.arg_names
    # A state's two 16-bit values as one integer.
    states = {"state_ptr": "*i32", "windows_ptr": "*i32"} if constants.get("PAIRED") else {}
    pointers = POINTERS | states
    signature = {
        name: "constexpr" if name in constants else (pointers | FLOATS).get(name, "i32")
        for name in names
    }
    plain = {*constants, *function.do_not_specialize}
    aligned = [n for n in (*POINTERS, *BY_16) if n in names and n not in plain]
    source = ASTSource(
        function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return compile(source, target=GPUTarget(backend, arch, 32 if backend == "cuda" else 64))


def main(op: str, variants: str, backend: str, arch: str) -> None:
    function = getattr(importlib.import_module(f"lfm2_plugin.ops.{op}.triton"), KERNELS[op])
    target = int(arch) if backend == "cuda" else arch
    found = {}
    for name, constants in json.loads(variants).items():
        kernel = build(function, constants, backend, target)
        found[name] = count(kernel, target) if backend == "cuda" else {"compiles": True}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
