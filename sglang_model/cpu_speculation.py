"""n-gram speculation on a CPU: drafts from the request's own text, verified as a chain.

SGLang's worker for ``--speculative-algorithm NGRAM`` can't be imported without an accelerator or ``sgl_kernel``; its
platforms may bring one of their own. This one differs in two ways. Drafts come from the prompt too (SGLang's come from
what was generated), and a step has as many as half of its requests have; if that is none, it is a plain decode. Sampled
tokens are distributed as without speculation: each draft is compared with a sample of the model's, and
what follows the first that differs is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .engine_api import (
    BaseSpecWorker,
    ForwardMode,
    GenerationBatchResult,
    SpecInput,
    SpecInputType,
    commit_mamba_states_after_verify,
    compute_spec_logprobs,
    get_parallel,
    get_spec,
    mamba_track_grid,
    prepare_mamba_track_for_verify,
)
from .prompt_lookup import lookup
from .replacements import replace_in_engine

MOST_TOKENS = 64
"""Tokens that a step of drafts may have. Beyond, the products are bound by arithmetic, and a draft costs as a token."""


class DraftChain(SpecInput):
    """A step's drafts for SGLang: of each request its last token and what may follow it."""

    def __init__(self, rows: torch.Tensor, places: torch.Tensor) -> None:
        """``rows`` (S, q) int64 tokens and their places (S, q) in the texts."""
        super().__init__(SpecInputType.NGRAM_VERIFY)
        self.draft_token_num = self.num_tokens_per_req = rows.shape[1]
        self.num_tokens_for_logprob_per_req = rows.shape[1]
        self.draft_token = rows.flatten()
        self.positions = places.flatten()


class NoDrafts(SpecInput):
    """What a batch carries from one step to the next: nothing, since drafts are made of the requests' texts."""

    def __init__(self) -> None:
        super().__init__(SpecInputType.NGRAM_VERIFY)

    def filter_batch(self, new_indices: Any, new_indices_cpu: Any = None) -> None:
        """Some requests have left the batch."""

    def merge_batch(self, spec_info: Any) -> None:
        """Requests have joined it."""


class NgramWorker(BaseSpecWorker):
    """SGLang's interface of a speculative worker, in the synchronous scheduler.

    Raises:
        ValueError: options of SGLang's own n-gram worker that this one hasn't.
    """

    def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any) -> None:
        super().__init__()
        spec = get_spec()
        if spec.speculative_ngram_external_corpus_path is not None:
            raise ValueError(
                "--speculative-ngram-external-corpus-path can't be served on a CPU; leave it out."
            )
        if get_parallel().pp_size > 1:
            raise ValueError("Speculation can't be served with --pp-size on a CPU; leave out one.")
        replace_in_engine(assign_req_to_token_pool_func=assign_places)
        self._target_worker = target_worker
        self._longest_text = target_worker.model_runner.model_config.context_len
        self._longest_match = spec.speculative_ngram_max_trie_depth
        self._most_drafts = spec.speculative_num_draft_tokens - 1

    @property
    def draft_worker(self) -> None:
        """No model makes the drafts."""
        return None

    def forward_batch_generation(
        self, batch: Any, on_publish: Callable | None = None, pp_proxy_tensors: Any = None
    ) -> GenerationBatchResult:
        """Run a step, and say how many tokens each request gained."""
        if not batch.forward_mode.is_decode():
            result = self.target_worker.forward_batch_generation(batch)
            return self._as_result(
                result, batch.seq_lens, torch.ones(len(batch.reqs), dtype=torch.int32)
            )
        drafts = self._drafts(batch)
        # All requests of a step have equally many tokens, so drafts that few have cost the others padding.
        count = sorted(map(len, drafts), reverse=True)[(len(drafts) - 1) // 2]
        return self._verify(batch, drafts, 1 + count) if count else self._decode(batch)

    def _drafts(self, batch: Any) -> list[list[int]]:
        """Each request's drafts. None where a token changes the next one's odds otherwise than through the model."""
        if (
            batch.has_grammar
            or batch.sampling_info.has_custom_logit_processor
            or any(_has_penalty(req.sampling_params) for req in batch.reqs)
        ):
            return [[] for _ in batch.reqs]
        most = min(self._most_drafts, MOST_TOKENS // len(batch.reqs) - 1)
        drafts = []
        for req in batch.reqs:
            parts = (np.asarray(ids, np.int64) for ids in (req.origin_input_ids, req.output_ids))
            text = np.concatenate(list(parts))
            room = min(
                req.sampling_params.max_new_tokens - len(req.output_ids),
                self._longest_text - len(text),
            )
            drafts.append(lookup(text, self._longest_match, min(most, room - 1)))
        return drafts

    def _decode(self, batch: Any) -> GenerationBatchResult:
        """One token for each request, as without speculation."""
        before = batch.seq_lens
        ends = before + 1
        table = batch.req_to_token_pool.req_to_token
        prepare_mamba_track_for_verify(batch)
        if batch.mamba_track_indices is not None:
            batch.mamba_track_mask = ends % mamba_track_grid(batch.tree_cache.page_size) == 0
        batch.input_ids = torch.tensor([_last_token(req) for req in batch.reqs])
        batch.out_cache_loc = table[batch.req_pool_indices, before].long()
        batch.seq_lens, batch.seq_lens_cpu = ends, ends
        batch.seq_lens_sum = int(ends.sum())
        batch.spec_info = None
        result = self.target_worker.forward_batch_generation(batch)
        logits = result.logits_output
        if batch.return_logprob:
            logits.next_token_logprobs = logits.next_token_logprobs.view(-1, 1)
        return self._as_result(result, ends, torch.ones_like(before, dtype=torch.int32))

    def _verify(self, batch: Any, drafts: list[list[int]], q: int) -> GenerationBatchResult:
        """The drafts that the model confirms, and one token more, for each request."""
        S = len(drafts)
        # Whoever has fewer drafts gets some token behind them: confirmed or not, it is judged like a draft.
        rows = torch.tensor(
            [
                [_last_token(req), *mine, *[0] * q][:q]
                for req, mine in zip(batch.reqs, drafts, strict=True)
            ]
        )
        places = batch.seq_lens[:, None] + torch.arange(q)
        table = batch.req_to_token_pool.req_to_token
        batch.out_cache_loc = table[batch.req_pool_indices[:, None], places].flatten().long()
        batch.input_ids = rows.flatten()
        batch.forward_mode = ForwardMode.TARGET_VERIFY
        # Padding of a text that is as long as may be has no position left.
        batch.spec_info = DraftChain(rows, places.clamp(max=self._longest_text - 1))
        prepare_mamba_track_for_verify(batch)
        result = self.target_worker.forward_batch_generation(batch, is_verify=True)
        chosen = self._choose(result.logits_output, batch, q)
        confirmed = (chosen.view(S, q)[:, :-1] == rows[:, 1:]).cumprod(dim=1).sum(dim=1)
        gained = (confirmed + 1).int()
        kept = torch.arange(q) < gained[:, None]
        index = torch.arange(S * q).view(S, q).masked_fill(~kept, -1)
        commit_mamba_states_after_verify(self.target_worker, batch, gained, index, q)
        if batch.return_logprob:
            compute_spec_logprobs(batch, result.logits_output, chosen, accept_index=index)
        result.next_token_ids = chosen
        ends = batch.seq_lens + gained
        batch.forward_mode = ForwardMode.DECODE
        return self._as_result(result, ends, gained, q)

    def _choose(self, logits: Any, batch: Any, q: int) -> torch.Tensor:
        """A token (S * q,) after each draft, with the sampling parameters of its request."""
        info = batch.sampling_info
        if info.logit_bias is not None:
            logits.next_token_logits.add_(info.logit_bias.repeat_interleave(q, dim=0))
        if info.is_all_greedy:
            return logits.next_token_logits.argmax(dim=-1)
        each = {
            name: value.repeat_interleave(q, dim=0)
            for name in ("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed")
            if (value := getattr(info, name)) is not None
        }
        # The sampler writes over the logits.
        copied = replace(logits, next_token_logits=logits.next_token_logits.clone())
        sampler = self.target_worker.model_runner.sampler
        return sampler(copied, replace(info, **each), False, [], [], batch.spec_info.positions)

    def _as_result(
        self, result: Any, ends: torch.Tensor, gained: torch.Tensor, width: int = 1
    ) -> GenerationBatchResult:
        """``ends`` (S,) tokens with keys and values now, ``gained`` (S,) new tokens, in lines of ``width``."""
        result.new_seq_lens, result.accept_lens = ends, gained
        result.speculative_num_draft_tokens = width
        result.next_draft_input = NoDrafts()
        return result

    def add_external_corpus(self, corpus_id: str, token_chunks: list[list[int]]) -> int:
        """Refuse texts to draft from; the caller answers the request with the error."""
        raise ValueError("Texts to draft from can't be served on a CPU.")

    remove_external_corpus = commit_corpus_load = add_external_corpus

    def list_external_corpora(self) -> dict[str, int]:
        """There are none."""
        return {}


def _has_penalty(params: Any) -> bool:
    return bool(
        params.frequency_penalty
        or params.presence_penalty
        or params.repetition_penalty != 1.0
        or params.min_new_tokens
    )


def _last_token(req: Any) -> int:
    """The token whose keys and values aren't there yet."""
    return (req.output_ids or req.origin_input_ids)[-1]


def assign_places(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Enter new places of the cache for tokens ``start_offset .. end_offset`` (S,) of each request in SGLang's table.

    SGLang does this for every speculative algorithm with a Triton kernel, which a CPU can't run.
    """
    counts = (end_offset - start_offset).long()
    rows = req_pool_indices.long().repeat_interleave(counts)
    firsts = (start_offset - counts.cumsum(0) + counts).repeat_interleave(counts)
    columns = firsts + torch.arange(len(rows))
    req_to_token[rows, columns] = out_cache_loc.to(req_to_token.dtype)
