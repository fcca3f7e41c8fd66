"""LoRA adapters made by PEFT on the random checkpoints, and the models that merging them gives."""

from pathlib import Path

import torch

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


def adapter(model: str, modules: list[str], parameters: list[str] = ()) -> tuple[Path, Path]:
    """Folders of a seeded adapter on these targets, and of the merged checkpoint."""
    from peft import LoraConfig, get_peft_model

    base = checkpoint(model)

    def make(folder: Path) -> None:
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=modules or None,
            target_parameters=list(parameters) or None,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(7)
        peft = get_peft_model(load(base, torch.float32), config)
        generator = torch.Generator().manual_seed(7)
        for name, weight in peft.named_parameters():
            if ".lora_B." in name:  # zeros in a fresh adapter
                weight.data = torch.randn(weight.shape, generator=generator) * 0.08
        peft.save_pretrained(folder / "adapter")
        peft.merge_and_unload().save_pretrained(folder / "merged")

    key = fingerprint(base, "lora", list(modules), list(parameters))
    folder = made_once(SHARED / "lora" / key, make)
    return folder / "adapter", folder / "merged"


def all_adapted_cases(model: str, merged: Path) -> list[Case]:
    """Prompts of all 200 lengths and the merged model's answers."""
    return list(clear_cases(merged, [c.prompt for c in cases(model)], vocabulary(model)))


def adapted_cases(model: str, merged: Path) -> list[Case]:
    """The shorter prompts and the merged model's answers, where these are clear in every step."""
    asked = [c.prompt for c in cases(model) if len(c.prompt) <= 300][:80]
    answers = greedy(merged, asked, NEW_TOKENS)
    return [
        Case(p, a) for p, a in zip(asked, answers, strict=True) if min(a.margins) >= CLEAR_MARGIN
    ]
