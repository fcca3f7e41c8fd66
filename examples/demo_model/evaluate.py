"""How many held-out questions the demo model answers, by greedy generation in transformers."""

from __future__ import annotations

import torch
from transformers import Lfm2MoeForCausalLM, PreTrainedTokenizerFast

from demo_model.balance import LoadBalancer
from lfm2_plugin.demo.tasks import TASKS, Question, is_right, questions

HELD_OUT_SEED = 20_000  # of the published accuracies
BATCH = 32


def replies(
    model: Lfm2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[Question]
) -> list[str]:
    """Greedy answers in the order of the questions; prompts are batched by like length, padded on the left."""
    prompts = [
        tokenizer.apply_chat_template(
            q.messages, tools=q.tools, tokenize=False, add_generation_prompt=True
        )
        for q in asked
    ]
    encoded = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    order = sorted(range(len(asked)), key=lambda i: len(encoded[i]))
    answers = [""] * len(asked)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        width = max(len(encoded[i]) for i in chosen)
        ids = torch.full((len(chosen), width), tokenizer.pad_token_id)
        for row, i in enumerate(chosen):
            ids[row, width - len(encoded[i]) :] = torch.tensor(encoded[i])
        mask = (
            torch.arange(width) >= torch.tensor([[width - len(encoded[i])] for i in chosen])
        ).long()
        longest = (
            max(len(tokenizer.encode(asked[i].answer, add_special_tokens=False)) for i in chosen)
            + 4
        )
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=longest, do_sample=False)
        for row, i in enumerate(chosen):
            reply = out[row, width:].tolist()
            end = tokenizer.eos_token_id
            answers[i] = tokenizer.decode(reply[: reply.index(end)]) if end in reply else "(no end)"
    return answers


def accuracy(
    model: Lfm2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int, seed: int
) -> dict[str, float]:
    """Share of right answers per task, over ``n`` held-out questions of each."""
    result = {}
    for task in TASKS:
        asked = questions(seed, n, task)
        result[task] = sum(map(is_right, asked, replies(model, tokenizer, asked))) / n
    return result


def expert_load(
    model: Lfm2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int, seed: int
) -> dict[int, list[float]]:
    """Per MoE layer each expert's share of the work, over ``n`` held-out prompts of every task."""
    balancer = LoadBalancer(model)
    for task in TASKS:
        for q in questions(seed, n, task):
            prompt = tokenizer.apply_chat_template(
                q.messages, tools=q.tools, tokenize=False, add_generation_prompt=True
            )
            ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
            with torch.inference_mode():
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return balancer.shares()


def quick_accuracy(
    model: Lfm2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int, seed: int
) -> dict[str, float]:
    """The same without generating: an answer counts when every token of it is the likeliest after the ones before.

    Greedy generation gives exactly these answers, up to rounding; one forward pass tells, so training uses this one.
    """
    result = {}
    for task in TASKS:
        right = 0
        for q in questions(seed, n, task):
            prompt = tokenizer.apply_chat_template(
                q.messages, tools=q.tools, tokenize=False, add_generation_prompt=True
            )
            head = tokenizer.encode(prompt, add_special_tokens=False)
            ids = torch.tensor(
                [head + tokenizer.encode(q.answer + "<|im_end|>", add_special_tokens=False)]
            )
            with torch.inference_mode():
                best = model(
                    input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - len(head) + 1
                ).logits.argmax(-1)
            right += bool((best[0, :-1] == ids[0, len(head) :]).all())
        result[task] = right / n
    return result
