"""Every bound that a test may use, with its reason. A test names a row; it never brings a number of its own.

``rtol`` and ``atol`` are those of torch.testing.assert_close. Rounding units: float32 2**-24,
float16 2**-11, bfloat16 2**-8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Bound:
    rtol: float
    atol: float
    reason: str


_SUM_ORDER = "the same products summed in another order"

BOUNDS: dict[tuple[str, torch.dtype], Bound] = {
    ("short_conv", torch.float32): Bound(1e-5, 1e-6, f"at most 9 terms; {_SUM_ORDER}"),
    ("short_conv", torch.bfloat16): Bound(
        2**-6,
        1e-5,
        "float32 sums an ulp apart may round to neighbours, once before and once after C",
    ),
    ("short_conv", torch.float16): Bound(
        2**-9,
        1e-5,
        "float32 sums an ulp apart may round to neighbours, once before and once after C",
    ),
    ("router", torch.float32): Bound(1e-6, 1e-7, "a sum of A terms and one division"),
    ("router", torch.bfloat16): Bound(2**-7, 0.0, "one rounding may fall on either side"),
    ("router", torch.float16): Bound(2**-10, 0.0, "one rounding may fall on either side"),
    ("linear", torch.float32): Bound(
        1e-5, 1e-5, f"K terms of size one over the root of K; {_SUM_ORDER}"
    ),
    ("linear", torch.bfloat16): Bound(2**-7, 1e-5, "one rounding may fall on either side"),
    ("linear", torch.float16): Bound(2**-10, 1e-5, "one rounding may fall on either side"),
    ("moe", torch.float32): Bound(1e-5, 1e-5, f"D and F terms of size one; {_SUM_ORDER}"),
    ("moe", torch.bfloat16): Bound(
        2**-6, 2**-6, "A expert outputs of size one, each rounded by its matmul, in another order"
    ),
    ("moe", torch.float16): Bound(
        2**-9, 2**-9, "A expert outputs of size one, each rounded by its matmul, in another order"
    ),
    ("logits", torch.float32): Bound(
        1e-4, 1e-4, "numerics contract: float32 logits within 1e-4 of transformers"
    ),
    ("engine_logprob", torch.float32): Bound(
        0.0, 1e-3, "a chunk of another length is multiplied in other blocks; some 1e-5 a layer"
    ),
    ("engine_logprob", torch.bfloat16): Bound(
        0.0, 0.25, "the same in bf16: logits of size ten, 8 bits, some roundings a layer"
    ),
}

# The smallest lead of a float32 reference's best logit that counts as a decision: sums in another order move logits of
# size one to ten by some 1e-5, so prompts with a closer step are replaced by others of their length.
CLEAR_MARGIN = 1e-3

# Error against float32 of a bf16 or fp16 run, as a multiple of the error of transformers in the same dtype.
HALF_PRECISION_ERROR_RATIO = 2.0


def assert_within(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """assert_close with the bound ``name`` for the dtype of ``actual``."""
    bound = BOUNDS[name, actual.dtype]
    torch.testing.assert_close(
        actual,
        expected,
        rtol=bound.rtol,
        atol=bound.atol,
        msg=lambda text: f"{text}\nBound {name}: {bound.reason}",
    )
