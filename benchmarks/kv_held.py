"""What one request really holds, step by step: vLLM's own scheduler is run on a planned cache, without a model.

The planner's figure is a claim, the most that a request may ever hold. The scheduler gives blocks out and takes them
back while a request runs; here one request goes through prefill and decode and its blocks for conv state are counted
after every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_request_block_hasher,
    init_none_hash,
    resolve_cache_hit_alignment_tokens,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

_NULL_BLOCK = 0


@dataclass(frozen=True)
class Held:
    """Blocks for conv state of one request.

    Attributes:
        prefill_steps: tokens scheduled in each step of the prompt.
        peak: most blocks after any step.
        decoding: mean over the decode steps.
    """

    prefill_steps: tuple[int, ...]
    peak: int
    decoding: float


def _scheduler(config: VllmConfig, kv: KVCacheConfig) -> tuple[Scheduler, int]:
    """The scheduler as the engine core makes it, and the block size that prompts are hashed by."""
    planned = generate_scheduler_kv_cache_config([kv])
    config.cache_config.num_gpu_blocks = planned.num_blocks
    block_size, hash_block_size = resolve_kv_cache_block_sizes(planned, config)
    planned.hash_block_size = hash_block_size
    planned.cache_hit_alignment_tokens = resolve_cache_hit_alignment_tokens(
        planned, config, block_size, hash_block_size
    )
    scheduler = Scheduler(
        vllm_config=config,
        kv_cache_config=planned,
        structured_output_manager=StructuredOutputManager(config),
        block_size=block_size,
        hash_block_size=hash_block_size,
    )
    return scheduler, hash_block_size


def held(config: VllmConfig, kv: KVCacheConfig, prompt: int, answer: int) -> Held:
    """Run one request of ``prompt`` and ``answer`` tokens through vLLM's scheduler.

    Raises:
        RuntimeError: the scheduler did not schedule the request in some step.
    """
    scheduler, hash_block_size = _scheduler(config, kv)
    conv_groups = [
        i
        for i, group in enumerate(kv.kv_cache_groups)
        if isinstance(group.kv_cache_spec, MambaSpec)
    ]
    hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
    init_none_hash(hash_function)
    request = Request(
        request_id="one",
        prompt_token_ids=list(range(prompt)),
        sampling_params=SamplingParams(max_tokens=answer, ignore_eos=True),
        pooling_params=None,
        block_hasher=get_request_block_hasher(hash_block_size, hash_function),
    )
    scheduler.add_request(request)
    prefill: list[int] = []
    decode: list[int] = []
    counts: list[int] = []
    while not request.is_finished():
        step = scheduler.schedule()
        tokens = step.num_scheduled_tokens.get("one", 0)
        if not tokens:
            raise RuntimeError("vLLM's scheduler left a lone request out of a step")
        blocks = scheduler.kv_cache_manager.get_block_ids("one")
        counts.append(sum(block != _NULL_BLOCK for i in conv_groups for block in blocks[i]))
        prefilling = request.num_output_tokens == 0
        (prefill if prefilling else decode).append(tokens if prefilling else counts[-1])
        sampled = [7] if request.num_computed_tokens >= prompt else []
        scheduler.update_from_output(
            step, ModelRunnerOutput(["one"], {"one": 0}, sampled_token_ids=[sampled])
        )
    return Held(tuple(prefill), max(counts), fmean(decode))
