"""An engine job with vLLM's asynchronous front: requests that are aborted while they run."""

import asyncio

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from tests.engine_vllm.engine_jobs import DEFAULTS


def abort_in_flight(
    model: str, engine: dict, prompts: list[list[int]], aborted: list[int], after: int
) -> dict:
    """Starts every prompt at once, drops the ``aborted`` ones after some tokens, then asks them again.

    Returns:
        {"finished": tokens by prompt, "partial": tokens that the aborted had, "again": their tokens,
        "unfinished": requests that the engine still holds at the end}
    """
    values = {**DEFAULTS, **engine}
    del values["scheduler_cls"]  # the scheduler lives in another process here
    return asyncio.run(_run(AsyncEngineArgs(model=model, **values), prompts, set(aborted), after))


async def _run(args: AsyncEngineArgs, prompts: list[list[int]], aborted: set[int], after: int):
    llm = AsyncLLM.from_engine_args(args)
    settings = SamplingParams(
        temperature=0, max_tokens=16, ignore_eos=True, output_kind=RequestOutputKind.CUMULATIVE
    )

    async def ask(index: int, name: str, leave_after: int | None) -> list[int]:
        tokens: list[int] = []
        stream = llm.generate({"prompt_token_ids": prompts[index]}, settings, f"{name}{index}")
        async for out in stream:
            tokens = list(out.outputs[0].token_ids)
            if leave_after is not None and len(tokens) >= leave_after:
                await llm.abort(f"{name}{index}")
                await stream.aclose()
                break
        return tokens

    first = await asyncio.gather(
        *(ask(i, "first", after if i in aborted else None) for i in range(len(prompts)))
    )
    again = await asyncio.gather(*(ask(i, "again", None) for i in sorted(aborted)))
    unfinished = llm.output_processor.get_num_unfinished_requests()
    llm.shutdown()
    return {
        "finished": [t for i, t in enumerate(first) if i not in aborted],
        "partial": [t for i, t in enumerate(first) if i in aborted],
        "again": again,
        "unfinished": unfinished,
    }
