"""Options of speculation: those that SGLang leaves at values made for attention, settled before it reads them, and a
drafter that it can't run, refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lfm2_plugin.arch import MODEL_TYPE

from .config import Lfm2MoeConfig
from .engine_api import (
    HuggingFaceConfig,
    declare_resolution,
    model_config_of,
    platforms_bring_workers,
    resolving_view,
    sglang_version,
)
from .registration import SOURCE

HYBRIDS = (MODEL_TYPE, "lfm2")
"""Models of the family, by ``model_type``; both engines' other hybrids are no drafters of a tokenizer like ours."""
DEFAULT_BREADTH = 10
"""SGLang's; how many branches a tree of drafts may have."""
CPU_DRAFT_TOKENS = 4
"""A request's tokens in a step on a CPU, its last one and drafts. Each may need other experts' weights read."""


def settle_drafts(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The step of SGLang's resolution that reads the options of speculation, ours before it.

    Raises:
        ValueError: a drafter of this family, whatever the target; a tree of drafts on a CPU, or drafts on a CPU in a
            release that can't have them.
    """
    options = resolving_view(server_args)
    algorithm = (options.speculative_algorithm or "").upper()
    if algorithm == "STANDALONE":
        _check_drafter(options)
    if algorithm == "NGRAM" and isinstance(model_config_of(server_args).hf_config, Lfm2MoeConfig):
        chosen = _on_cpu(options) if options.device == "cpu" else _on_gpu(options)
        if chosen:
            declare_resolution(server_args, SOURCE, **chosen)
    previous(server_args)


def _check_drafter(options: Any) -> None:
    """A model with conv states can't draft: nothing takes its states back when drafts are declined."""
    model = options.speculative_draft_model_path
    if model is None:
        return  # SGLang asks for one by itself
    entries, _ = HuggingFaceConfig.get_config_dict(
        model, revision=options.speculative_draft_model_revision
    )
    if entries.get("model_type") in HYBRIDS:
        raise ValueError(
            f"{model} has conv states, and SGLang can't draft with such a model: declined drafts would stay in its "
            "states. Use --speculative-algorithm NGRAM, or a drafter made of attention only that shares the tokenizer."
        )


def _on_cpu(options: Any) -> dict[str, int]:
    if not platforms_bring_workers():
        raise ValueError(
            f"n-gram speculation on a CPU needs SGLang 0.5.23; this is {sglang_version}. Leave out "
            "--speculative-algorithm."
        )
    breadth = options.speculative_ngram_max_bfs_breadth
    if breadth not in (1, DEFAULT_BREADTH):
        raise ValueError(
            f"--speculative-ngram-max-bfs-breadth {breadth} asks for drafts in a tree; on a CPU they are a chain. "
            "Leave the option out."
        )
    chosen = {"speculative_ngram_max_bfs_breadth": 1}
    if options.speculative_num_draft_tokens is None:
        chosen["speculative_num_draft_tokens"] = CPU_DRAFT_TOKENS
    return chosen


def _on_gpu(options: Any) -> dict[str, int]:
    # With breadth 1 SGLang takes drafts for a chain, but fills up short ones with siblings.
    return (
        {"speculative_ngram_max_bfs_breadth": 2}
        if options.speculative_ngram_max_bfs_breadth == 1
        else {}
    )
