"""LoRA adapters made by PEFT on the random checkpoints, and the models that merging them gives."""

import json
import shutil
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tests.engine_common.checkpoints import checkpoint
from tests.engine_common.engines import SHARED
from tests.engine_common.hf_reference import fingerprint, greedy, load
from tests.engine_common.references import NEW_TOKENS, Case, cases, clear_cases, vocabulary
from tests.engine_common.shared_cache import made_once
from tests.tolerances import CLEAR_MARGIN

ATTENTION = ["q_proj", "k_proj", "v_proj", "self_attn.out_proj"]
CONV = ["conv.in_proj", "conv.out_proj"]
MLP = ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
# Experts are stacked parameters in transformers, not modules.
EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
TARGETS = {
    "attention": (ATTENTION, []),
    "conv": (CONV, []),
    "mlp": (MLP, []),
    "experts": ([], EXPERTS),
    "all": (ATTENTION + CONV + MLP, EXPERTS),
}
"""What the adapters of both engines' tests are on: (modules, parameters)."""
HALVES = {"up": ([], EXPERTS[:1]), "down": ([], EXPERTS[1:])}


def unstacked(
    tensors: dict[str, torch.Tensor], experts: int, rank: int = 8, left_out: Collection[int] = ()
) -> dict[str, torch.Tensor]:
    """Factors of stacked experts in the form that PEFT gave while transformers had a module for each expert.

    Args:
        left_out: experts that get no factors.
    """
    apart = {}
    for name, tensor in tensors.items():
        stack, _, side = name.removesuffix(".weight").rpartition(".")
        place = stack.removesuffix(".base_layer")
        shards = ("w1", "w3") if stack != place else ("w2",)
        for expert in set(range(experts)) - set(left_out):
            for number, shard in enumerate(shards):
                if side == "lora_A":
                    one = tensor.view(experts, rank, -1)[expert]
                else:
                    one = tensor.view(len(tensor), rank, experts)[..., expert]
                    one = one.chunk(len(shards))[number]
                apart[f"{place}.{expert}.{shard}.{side}.weight"] = one.clone()
    return apart


PATTERNS = {
    "rank_pattern": {"experts.down_proj": 16, "k_proj": 16},
    "alpha_pattern": {"experts.down_proj": 64, "k_proj": 16, "w2": 1},
}


def patterned(tensors: dict[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    """An adapter of rank 8 and alpha 16 written with PATTERNS.

    The scaling of experts.down_proj is 4 instead of 2, that of k_proj 1, that of w2 1/8, and B makes up for it; the two
    ranks grow by zeros.
    """
    changed = {}
    for name, tensor in tensors.items():
        place, _, side = name.removesuffix(".weight").rpartition(".")
        is_b = side == "lora_B"
        if place.endswith(".experts"):
            if is_b:
                wide = F.pad(tensor.unflatten(1, (8, experts)) / 2, (0, 0, 0, 8)).flatten(1)
            else:
                wide = F.pad(tensor.unflatten(0, (experts, 8)), (0, 0, 0, 8)).flatten(0, 1)
            changed[name] = wide
        elif place.endswith("k_proj"):
            changed[name] = F.pad(tensor * 2, (0, 8)) if is_b else F.pad(tensor, (0, 0, 0, 8))
        elif place.endswith("feed_forward.w2"):
            changed[name] = tensor * 16 if is_b else tensor
        else:
            changed[name] = tensor
    return changed


ANEW: dict[str, tuple[str, Callable[..., dict[str, torch.Tensor]], dict]] = {
    "one by one": (
        "experts",
        unstacked,
        {"target_modules": ["w1", "w2", "w3"], "target_parameters": None},
    ),
    "patterns": ("all", patterned, PATTERNS),
}
"""One of TARGETS written in another form: which, how its tensors change, and its settings."""
FEW, WITHOUT = "few one by one", (0, 5)
"""The form in which some experts have no factors, and which."""
FORMS = (*HALVES, *ANEW, FEW)


def adapter(
    model: str, modules: list[str], parameters: list[str] = (), **options
) -> tuple[Path, Path]:
    """Folders of a seeded adapter on these targets, and of the merged checkpoint.

    Args:
        options: more of PEFT's settings.
    """
    from peft import LoraConfig, get_peft_model

    base = checkpoint(model)

    def make(folder: Path) -> None:
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=modules or None,
            target_parameters=list(parameters) or None,
            task_type="CAUSAL_LM",
            **options,
        )
        torch.manual_seed(7)
        peft = get_peft_model(load(base, torch.float32), config)
        generator = torch.Generator().manual_seed(7)
        for name, weight in peft.named_parameters():
            if ".lora_B." in name or ".lora_embedding_B." in name:  # zeros in a fresh adapter
                weight.data = torch.randn(weight.shape, generator=generator) * 0.08
            elif ".lora_embedding_A." in name:  # as is this one
                weight.data = torch.randn(weight.shape, generator=generator)
        peft.save_pretrained(folder / "adapter")
        peft.merge_and_unload().save_pretrained(folder / "merged")

    more = [options] if options else []
    key = fingerprint(base, "lora", list(modules), list(parameters), *more)
    folder = made_once(SHARED / "lora" / key, make)
    return folder / "adapter", folder / "merged"


def form(model: str, name: str) -> tuple[Path, Path]:
    """As :func:`adapter`, of one of FORMS: what trainers make beside the plain adapters of TARGETS."""
    if name in HALVES:
        return adapter(model, *HALVES[name])
    of, change, settings = ANEW["one by one" if name == FEW else name]
    source, merged = adapter(model, *TARGETS[of])
    experts = json.loads((checkpoint(model) / "config.json").read_text())["num_experts"]
    left_out = {"left_out": WITHOUT} if name == FEW else {}

    def write(folder: Path) -> None:
        rewritten(source, folder, lambda tensors: change(tensors, experts, **left_out), **settings)

    key = fingerprint(source, "lora anew", name, settings)
    folder = made_once(SHARED / "lora" / key, write)
    return folder, without_experts(model, merged) if name == FEW else merged


def without_experts(model: str, merged: Path) -> Path:
    """A merged checkpoint with the base model's weights for the experts of WITHOUT."""

    def write(folder: Path) -> None:
        shutil.copytree(merged, folder)
        base = load_file(checkpoint(model) / "model.safetensors")
        weights = load_file(merged / "model.safetensors")
        for expert in WITHOUT:
            weights |= {n: t for n, t in base.items() if f".experts.{expert}." in n}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    key = fingerprint(merged, "without experts", WITHOUT)
    return made_once(SHARED / "lora" / key, write)


def rewritten(source: Path, target: Path, change=None, without: str = "", **settings) -> Path:
    """A copy of an adapter with other tensors and settings.

    Args:
        change: tensors -> tensors.
        without: a setting that is left out.
    """
    shutil.copytree(source, target)
    path = target / "adapter_model.safetensors"
    if change is not None:
        save_file(change(load_file(path)), path)
    config = target / "adapter_config.json"
    found = {**json.loads(config.read_text()), **settings}
    found.pop(without, None)
    config.write_text(json.dumps(found))
    return target


def _renamed(old: str, new: str):
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


def _with_a_value(value: float):
    """One value of one factor replaced."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[max(tensors)].view(-1)[-1] = value
        return tensors

    return change


def _half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in tensors.items() if ".lora_B." not in name}


BAD: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "other kind": (partial(rewritten, peft_type="IA3"), "of type 'IA3'; only LORA"),
    "aLoRA": (partial(rewritten, alora_invocation_tokens=[5]), "with alora_invocation_tokens"),
    "DoRA": (partial(rewritten, use_dora=True), "trained with use_dora"),
    "saved modules": (partial(rewritten, modules_to_save=["lm_head"]), "with modules_to_save"),
    "bias": (partial(rewritten, bias="all"), "trained with bias"),
    "no rank": (
        partial(rewritten, without="r"),
        "r is None and must be a whole number from 1 to 1024",
    ),
    "rank 0": (partial(rewritten, r=0), "r is 0 and must be a whole number from 1 to 1024"),
    "rank in words": (
        partial(rewritten, r="8"),
        "r is '8' and must be a whole number from 1 to 1024",
    ),
    "no alpha": (partial(rewritten, without="lora_alpha"), "lora_alpha is None and must be"),
    "alpha in words": (partial(rewritten, lora_alpha="16"), "lora_alpha is '16' and must be"),
    "other rank": (partial(rewritten, r=4), "they must be (4, "),
    "integers": (
        partial(rewritten, change=lambda ts: {name: t.int() for name, t in ts.items()}),
        "neither float32 nor float16 nor bfloat16",
    ),
    "NaN": (
        partial(rewritten, change=_with_a_value(float("nan"))),
        "has NaN or infinity in: base_model.",
    ),
    "infinity": (
        partial(rewritten, change=_with_a_value(float("inf"))),
        "has NaN or infinity in: base_",
    ),
    "half": (partial(rewritten, change=_half), "only one of the factors A and B"),
    "unknown module": (
        partial(rewritten, change=_renamed("conv.in_proj", "conv.conv")),
        "on modules that can't be adapted: model.layers.0.conv.conv",
    ),
    "other model": (
        partial(rewritten, change=lambda ts: {n: t[..., :4].contiguous() for n, t in ts.items()}),
        "It was trained on another model",
    ),
    "damaged": (
        lambda source, target: _cut(rewritten(source, target) / "adapter_model.safetensors"),
        "adapter_model.safetensors is damaged",
    ),
    "no settings": (
        lambda source, target: (rewritten(source, target) / "adapter_config.json").unlink(),
        "There is no adapter_config.json",
    ),
    "no tensors": (
        lambda source, target: (rewritten(source, target) / "adapter_model.safetensors").unlink(),
        "There is no adapter_model.safetensors",
    ),
}
"""Adapters that no engine can serve: (source, target) -> writes it, and what is said of it."""


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def bad_adapters(model: str, folder: Path) -> dict[str, Path]:
    """All of BAD below ``folder``."""
    source = adapter(model, ["conv.in_proj"])[0]
    for name, (write, _) in BAD.items():
        write(source, folder / name)
    return {name: folder / name for name in BAD}


def form_cases(model: str, name: str) -> list[Case]:
    """Short prompts and the answers of the model that one of FORMS was merged into, where these are clear."""
    merged = form(model, name)[1]
    if name in ANEW:
        return adapted_cases(model, merged)[:24]
    asked = [case.prompt for case in cases(model)[:12]]
    return clear(asked, merged)


def all_adapted_cases(model: str, merged: Path) -> list[Case]:
    """Prompts of all 200 lengths and the merged model's answers."""
    return list(clear_cases(merged, [c.prompt for c in cases(model)], vocabulary(model)))


def adapted_cases(model: str, merged: Path) -> list[Case]:
    """The shorter prompts and the merged model's answers, where these are clear in every step."""
    return clear([c.prompt for c in cases(model) if len(c.prompt) <= 300][:80], merged)


def clear(asked: list[list[int]], merged: Path) -> list[Case]:
    """The prompts whose answer by the merged model is clear in every step, with the answers."""
    answers = greedy(merged, asked, NEW_TOKENS)
    return [
        Case(p, a) for p, a in zip(asked, answers, strict=True) if min(a.margins) >= CLEAR_MARGIN
    ]
