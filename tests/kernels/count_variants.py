"""Count the kernels that Triton would compile while an engine serves, by what each launch is specialised on.

Run as a program, since a process has kernels either interpreted or compiled::

    python tests/kernels/count_variants.py

prints {"short_conv": .., "short_conv_drafts": .., "router": ..}. The launches are those of our operators for steps of
every size; Triton's own code reads off their arguments what a compiled kernel would be kept under.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from lfm2_plugin.conv_batch import ConvBatch
from lfm2_plugin.ops.router import triton as router
from lfm2_plugin.ops.short_conv import triton as short_conv
from lfm2_plugin.ops.short_conv_drafts import triton as short_conv_drafts

D, K, EXPERTS, LONGEST = 64, 3, 32, 256
SIZES = (1, 2, 15, 16, 17, 32, 48, 100)
DTYPE = torch.bfloat16


class Launches:
    """Takes a kernel's place, and keeps what each launch would be compiled for."""

    def __init__(self, kernel: Any) -> None:
        target = GPUTarget("cuda", 90, 32)
        self.bind = create_function_from_signature(
            kernel.signature, kernel.params, make_backend(target)
        )
        self.variants: set[str] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            _, specialization, rest = self.bind(*arguments, **options)
            self.variants.add(f"{specialization} {rest}")

        return launch


def batch(decodes: int, prefills: int, padding: int) -> tuple[ConvBatch, int]:
    """A step of decodes of one token and prefills of three, in buffers that the engine keeps; and its rows."""
    lengths = [1] * decodes + [3] * prefills
    sequences = len(lengths)
    table = torch.ones(LONGEST, dtype=torch.int32)
    made = ConvBatch(
        # A step of prefills alone has its slots from the middle of an engine's table.
        slots=table[:sequences] if decodes else table[prefills : 2 * prefills],
        query_start=torch.tensor([0, *lengths]).cumsum(0).int(),
        has_initial_state=torch.ones(LONGEST, dtype=torch.bool)[prefills:][:sequences],
        num_decodes=decodes,
        num_decode_tokens=decodes,
        num_prefills=prefills,
        num_prefill_tokens=3 * prefills,
        null_slot=0,
    )
    return made, sum(lengths) + padding


def serve() -> None:
    """Steps of every size: decodes, prefills, both, with padding and without; drafts; the routing of each."""
    weight = torch.zeros(K, D, dtype=DTYPE).t()
    state = torch.zeros(LONGEST, K - 1, D, dtype=DTYPE).transpose(1, 2)
    bias = torch.zeros(EXPERTS)
    for n in SIZES:
        for decodes, prefills, padding in ((n, 0, 0), (0, n, 0), (n, n, 0), (n, 0, n), (n, 1, 0)):
            step, rows = batch(decodes, prefills, padding)
            bcx, out = torch.zeros(rows, 3 * D, dtype=DTYPE), torch.zeros(rows, D, dtype=DTYPE)
            short_conv.short_conv_triton(bcx, weight, None, state, step, out)
            logits = torch.zeros(rows, EXPERTS, dtype=DTYPE)
            router.route_triton(logits, bias, 4, True, 1.0, None)
        for drafts in (1, 2, 4, 16):
            bcx = torch.zeros(n * drafts, 3 * D, dtype=DTYPE)
            seen = torch.zeros(n, drafts, K, dtype=torch.int64)
            windows = torch.zeros(n, drafts, D, K - 1, dtype=DTYPE)
            slots = torch.ones(LONGEST, dtype=torch.int32)[1 : n + 1]
            short_conv_drafts.short_conv_drafts_triton(
                bcx, weight, None, state, slots, seen, windows, torch.zeros_like(bcx[:, :D])
            )


def main() -> None:
    kernels = {
        "short_conv": (short_conv, "_short_conv"),
        "short_conv_drafts": (short_conv_drafts, "_short_conv_drafts"),
        "router": (router, "_route"),
    }
    found = {}
    for name, (module, kernel) in kernels.items():
        found[name] = Launches(getattr(module, kernel))
        setattr(module, kernel, found[name])
    serve()
    print(json.dumps({name: len(launches.variants) for name, launches in found.items()}))


if __name__ == "__main__":
    main()
