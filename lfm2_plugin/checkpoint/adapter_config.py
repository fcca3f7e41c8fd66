"""The settings of a LoRA adapter, ``adapter_config.json``: what its factors mean, or why it can't be served."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

CONFIG_FILE = "adapter_config.json"

# Settings that change what the factors mean or add to them, and the values that leave them as they are.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "bias": (None, "none"),
    "ensure_weight_tying": (None, False),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False, {}),
    "use_dora": (None, False),
    "use_qalora": (None, False),
}
# Ways to start a training that leave the base model as it is; the others (PiSSA, OLoRA, CorDA, LoftQ) change its
# weights when PEFT loads the adapter.
_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# In which order the columns of a stack's factor B lie: PEFT's, and that of Unsloth before September 2026. Later
# releases of Unsloth write the order into the config as lora_B_layout.
RANK_MAJOR, GROUPED_BY_EXPERT = "rank_major", "grouped_by_expert"
# Releases of PEFT that took the outputs of stacked experts for their inputs.
_TRANSPOSED = ("0.17.", "0.18.")

MOST_RANK = 1024
"""Factors are padded to the largest rank that the settings name, so it has to have a bound; engines serve up to 512."""


class AdapterError(ValueError):
    """The adapter can't be served right; the text says why and what to do."""


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's settings say of its factors.

    Attributes:
        rank, alpha: of every module that no pattern matches.
        rslora: the scaling is alpha / sqrt(rank), not alpha / rank.
        rank_pattern, alpha_pattern: a regular expression for the end of a module's name -> its own rank or alpha.
        grouped_by_expert: the columns of a stack's factor B lie expert by expert, not rank by rank.
        transposed: a stack of experts whose shapes leave it open has the factors of the transposed weight.
    """

    rank: int
    alpha: float
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    grouped_by_expert: bool = False
    transposed: bool = False

    @classmethod
    def from_dict(cls, settings: Any) -> AdapterConfig:
        """Check the settings of an ``adapter_config.json``.

        Raises:
            AdapterError: not LoRA, LoRA with something that isn't served, or settings that make no sense.
        """
        if not isinstance(settings, Mapping):
            raise AdapterError(f"Its {CONFIG_FILE} has {type(settings).__name__}, not settings.")
        kind = str(settings.get("peft_type", "")).upper()
        if kind != "LORA":
            raise AdapterError(f"It is of type {kind or 'unknown'!r}; only LORA can be served.")
        _refuse_variants(settings)
        rank: Any = settings.get("r")
        alpha: Any = settings.get("lora_alpha")
        rslora = settings.get("use_rslora") or False
        layout = settings.get("lora_B_layout") or RANK_MAJOR
        ranks, alphas = (settings.get(f"{name}_pattern") or {} for name in ("rank", "alpha"))
        checks = {
            "r": (rank, _is_rank(rank), f"a whole number from 1 to {MOST_RANK}"),
            "lora_alpha": (alpha, _is_number(alpha), "a number"),
            "use_rslora": (rslora, isinstance(rslora, bool), "true or false"),
            "lora_B_layout": (
                layout,
                layout in (RANK_MAJOR, GROUPED_BY_EXPERT),
                f"{RANK_MAJOR} or {GROUPED_BY_EXPERT}",
            ),
            "rank_pattern": (ranks, _is_pattern(ranks, _is_rank), "module names with ranks"),
            "alpha_pattern": (alphas, _is_pattern(alphas, _is_number), "module names with numbers"),
        }
        wrong = [
            f"{name} is {value!r} and must be {expected}"
            for name, (value, fine, expected) in checks.items()
            if not fine
        ]
        if wrong:
            raise AdapterError(f"In its {CONFIG_FILE} {', '.join(wrong)}. Save the adapter again.")
        return cls(
            rank=cast(int, rank),  # looked at above
            alpha=cast(float, alpha),
            rslora=rslora,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            grouped_by_expert=layout == GROUPED_BY_EXPERT,
            transposed=str(settings.get("peft_version")).startswith(_TRANSPOSED),
        )

    @property
    def largest_rank(self) -> int:
        """The largest rank that a module may have."""
        return max(self.rank, *self.rank_pattern.values(), 0)

    def of(self, module: str) -> tuple[int, float]:
        """Rank and scaling of a module by its name in transformers, as PEFT finds them: the first pattern counts."""
        rank = _first_match(self.rank_pattern, module, self.rank)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The settings in an adapter's folder.

    Raises:
        AdapterError: there are none, or they can't be read or served.
    """
    path = folder / CONFIG_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing = CONFIG_FILE if folder.is_dir() else "folder"
        raise AdapterError(
            f"There is no {missing}: {path if folder.is_dir() else folder}. Give the folder that PEFT's "
            "save_pretrained wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} can't be read: {error}. Save the adapter again.") from error
    return AdapterConfig.from_dict(settings)


def _refuse_variants(settings: Mapping[str, Any]) -> None:
    found = [name for name, plain in _PLAIN.items() if settings.get(name) not in plain]
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _INITIALISATIONS:
        found.append(f"init_lora_weights={start}")
    if found:
        raise AdapterError(
            f"It was trained with {', '.join(found)}, which can't be served. Merge it into the model "
            "(merge_and_unload in PEFT), or train it without."
        )


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_RANK


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_pattern(value: Any, fine: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    try:
        for key in value:
            re.compile(key)
    except (re.error, TypeError):
        return False
    return all(fine(number) for number in value.values())


def _first_match(pattern: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    matches = (
        value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module) is not None
    )
    return next(matches, otherwise)
