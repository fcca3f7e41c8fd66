"""An engine job with SGLang's asynchronous front: requests that are aborted while they run."""

import asyncio

from tests.engine_sglang.engine_jobs import ask_ranks, start


def abort_in_flight(
    model: str, engine: dict, prompts: list[list[int]], aborted: list[int], after: int
) -> dict:
    """Starts every prompt at once, drops the ``aborted`` ones after some tokens, then asks them again.

    Returns:
        {"finished": tokens by prompt, "partial": tokens that the aborted had, "again": their tokens,
        "reasons": how the aborted ended, "unfinished": requests that the engine still holds at the end}
    """
    llm = start(model, engine)
    answers = llm.loop.run_until_complete(_run(llm, prompts, set(aborted), after))
    held = ask_ranks(llm, "report")[0]["unfinished"]
    return {**answers, "unfinished": held + len(llm.tokenizer_manager.rid_to_state)}


async def _run(llm, prompts: list[list[int]], aborted: set[int], after: int) -> dict:
    settings = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}

    async def ask(index: int, name: str, leave_after: int | None) -> tuple[list[int], str]:
        rid = f"{name}-{index:03}"  # an abort also hits those whose names begin with its own
        tokens: list[int] = []
        reason = ""
        stream = await llm.async_generate(
            input_ids=prompts[index], sampling_params=settings, stream=True, rid=rid
        )
        async for out in stream:
            tokens = out["output_ids"]
            reason = (out["meta_info"]["finish_reason"] or {}).get("type", "")
            if leave_after is not None and len(tokens) >= leave_after:
                llm.tokenizer_manager.abort_request(rid=rid)
                leave_after = None
        return tokens, reason

    first = await asyncio.gather(
        *(ask(i, "first", after if i in aborted else None) for i in range(len(prompts)))
    )
    again = await asyncio.gather(*(ask(i, "again", None) for i in sorted(aborted)))
    return {
        "finished": [t for i, (t, _) in enumerate(first) if i not in aborted],
        "partial": [t for i, (t, _) in enumerate(first) if i in aborted],
        "reasons": [r for i, (_, r) in enumerate(first) if i in aborted],
        "again": [tokens for tokens, _ in again],
    }
