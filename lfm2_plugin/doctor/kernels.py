"""The implementation that each operator runs on each kind of device, and a short comparison with the naive one."""

import importlib.util
import time
from collections.abc import Callable, Iterator

import torch

from lfm2_plugin.conv_batch import ConvBatch
from lfm2_plugin.dispatch import ENV, ImpossibleChoice, check_choice, implementation
from lfm2_plugin.doctor.findings import Finding
from lfm2_plugin.ops.linear import linear, linear_naive, pack
from lfm2_plugin.ops.moe import moe, moe_naive
from lfm2_plugin.ops.router import kernel_devices, route, route_naive, try_kernel
from lfm2_plugin.ops.short_conv import short_conv, short_conv_naive
from lfm2_plugin.ops.short_conv_drafts import (
    branches,
    chain,
    short_conv_drafts,
    short_conv_drafts_naive,
)

# Both sides compute in float32 and may sum in another order; 1e-5 is some 80 roundings of a float32.
BOUND = 1e-5
Outputs = list[torch.Tensor]


def kernel_findings() -> Iterator[Finding]:
    """One finding an operator and kind of device, and what keeps the user's choice from a default server."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        yield from graph_findings(device)
        for name, check in CHECKS.items():
            yield _compare(name, check, device)


def graph_findings(device: str) -> Iterator[Finding]:
    """Where the user's choice runs, but not in the CUDA graphs that engines capture by default."""
    try:
        check_choice(device)
        check_choice(device, captures_graphs=True)
    except ImpossibleChoice as error:
        yield Finding("kernels", f"{ENV} on {device}", "fault", str(error))


def _compare(name: str, check: Callable[[str], tuple[Outputs, Outputs]], device: str) -> Finding:
    label = f"{name} on {device}"
    try:
        has_kernel = importlib.util.find_spec(f"lfm2_plugin.ops.{name}.triton") is not None
        chosen = implementation(device, triton=has_kernel)
    except ImpossibleChoice as error:
        return Finding("kernels", label, "fault", str(error))
    start = time.monotonic()
    try:
        ours, naive = check(device)
    except Exception as error:  # whatever a kernel raises is the finding
        return Finding("kernels", label, "fault", f"{chosen}: {type(error).__name__}: {error}")
    seconds = time.monotonic() - start
    if name == "router" and device in kernel_devices:
        chosen = "triton"
    worst = max(relative_error(a, b) for a, b in zip(ours, naive, strict=True))
    text = f"{chosen}, largest error against naive {worst:.1e} of {BOUND:.0e} allowed ({seconds:.2f} s)"
    if worst <= BOUND:
        return Finding("kernels", label, "ok", text)
    return Finding(
        "kernels", label, "fault", text, "report this with the output of `lfm2 doctor --json`"
    )


def relative_error(ours: torch.Tensor, naive: torch.Tensor) -> float:
    """Largest difference over the largest magnitude; infinite where ours is not finite."""
    if not torch.isfinite(ours).all():
        return float("inf")
    scale = naive.abs().max().clamp_min(1e-30)
    return float((ours.float() - naive.float()).abs().max() / scale)


def check_short_conv(device: str) -> tuple[Outputs, Outputs]:
    """Two decodes and two prefills in one step: outputs and states of both sides."""
    generator = torch.Generator().manual_seed(0)
    D, K = 256, 3
    lengths = [1, 1, 2, 60]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    bcx = torch.randn(sum(lengths) + 4, 3 * D, generator=generator).to(device)  # 4 rows of padding
    weight = torch.randn(D, K, generator=generator).to(device)
    state = torch.randn(8, D, K - 1, generator=generator).to(device)
    results = []
    for run in (short_conv, short_conv_naive):
        batch = ConvBatch(
            slots=torch.tensor([5, 2, 7, 1], dtype=torch.int32, device=device),
            query_start=starts.to(device),
            has_initial_state=torch.tensor([True, True, False, True], device=device),
            num_decodes=2,
            num_decode_tokens=2,
            num_prefills=2,
            num_prefill_tokens=62,
        )
        moved, out = state.clone(), torch.full((bcx.shape[0], D), float("nan"), device=device)
        run(bcx, weight, None, moved, batch, out)
        results.append([out, moved])
    return results[0], results[1]


def check_short_conv_drafts(device: str) -> tuple[Outputs, Outputs]:
    """Two sequences with a chain of three drafts each: outputs and windows of both sides."""
    generator = torch.Generator().manual_seed(0)
    S, q, D, K = 2, 3, 256, 3
    bcx = torch.randn(S * q, 3 * D, generator=generator).to(device)
    weight = torch.randn(D, K, generator=generator).to(device)
    state = torch.randn(8, D, K - 1, generator=generator).to(device)
    slots = torch.tensor([5, 2], device=device)
    seen = branches(chain(S, q, bcx.device), K)
    windows = [torch.zeros(S, q, D, K - 1, device=device) for _ in range(2)]
    ours = short_conv_drafts(bcx, weight, None, state, slots, seen, windows[0])
    naive = torch.empty_like(ours)
    short_conv_drafts_naive(bcx, weight, None, state, slots, seen, windows[1], naive)
    return [ours, windows[0]], [naive, windows[1]]


def check_router(device: str) -> tuple[Outputs, Outputs]:
    """64 tokens choosing 4 of 32 experts: weights and ids of both sides."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 32, generator=generator).to(device)
    try_kernel(logits.device, 32, 4, logits.dtype)  # as an engine's model does
    bias = torch.randn(32, generator=generator).to(device)
    chosen = route(logits, bias, 4, renormalise=True, scaling=1.5)
    naive = route_naive(logits, bias, 4, True, 1.5, None)
    return list(chosen), list(naive)


def check_moe(device: str) -> tuple[Outputs, Outputs]:
    """32 tokens through 4 of 8 experts, one of them absent for some: outputs of both sides."""
    generator = torch.Generator().manual_seed(0)
    E, D, F = 8, 64, 32
    x = torch.randn(32, D, generator=generator).to(device)
    w13 = torch.randn(E, 2 * F, D, generator=generator).div(D**0.5).to(device)
    w2 = torch.randn(E, D, F, generator=generator).div(F**0.5).to(device)
    weights = torch.rand(32, 4, generator=generator).to(device)
    ids = torch.rand(32, E, generator=generator).argsort(dim=1)[:, :4].to(torch.int32)
    ids[:5, 3] = -1
    sides = [run(x, w13, w2, weights, ids.to(device)) for run in (moe, moe_naive)]
    return [sides[0]], [sides[1]]


def check_linear(device: str) -> tuple[Outputs, Outputs]:
    """8 rows with a packed weight and a bias: outputs of both sides."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 96, generator=generator).to(device)
    weight = torch.randn(64, 96, generator=generator).to(device)
    bias = torch.randn(64, generator=generator).to(device)
    return [linear(x, pack(weight), bias)], [linear_naive(x, weight, bias)]


CHECKS: dict[str, Callable[[str], tuple[Outputs, Outputs]]] = {
    "short_conv": check_short_conv,
    "short_conv_drafts": check_short_conv_drafts,
    "router": check_router,
    "moe": check_moe,
    "linear": check_linear,
}
