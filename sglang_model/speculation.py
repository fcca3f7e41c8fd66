"""Options of n-gram speculation that SGLang leaves at values made for attention, settled before it reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .config import Lfm2MoeConfig
from .engine_api import (
    declare_resolution,
    model_config_of,
    platforms_bring_workers,
    resolving_view,
    sglang_version,
)
from .registration import SOURCE

DEFAULT_BREADTH = 10
"""SGLang's; how many branches a tree of drafts may have."""
CPU_DRAFT_TOKENS = 4
"""A request's tokens in a step on a CPU, its last one and drafts. Each may need other experts' weights read."""


def settle_drafts(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The step of SGLang's resolution that reads the options of speculation, ours before it.

    Raises:
        ValueError: a tree of drafts on a CPU, or drafts on a CPU in a release that can't have them.
    """
    options = resolving_view(server_args)
    algorithm = (options.speculative_algorithm or "").upper()
    if algorithm == "NGRAM" and isinstance(model_config_of(server_args).hf_config, Lfm2MoeConfig):
        chosen = _on_cpu(options) if options.device == "cpu" else _on_gpu(options)
        if chosen:
            declare_resolution(server_args, SOURCE, **chosen)
    previous(server_args)


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
