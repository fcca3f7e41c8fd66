"""The demo model's answers to its own questions in transformers."""

import torch

from lfm2_plugin.demo.tasks import Question, is_right, questions
from tests.engine_common.checkpoints import DEMO
from tests.engine_common.hf_reference import load, remembered

LONGEST_ANSWER = 96  # tokens
BATCH = 32


def prompt_ids(tokenizer, question: Question) -> list[int]:
    """The question as the server renders it, ready for the assistant's turn."""
    return tokenizer.apply_chat_template(
        question.messages, tools=question.tools, add_generation_prompt=True, return_dict=False
    )


def answers(asked: list[Question], dtype: torch.dtype = torch.float32) -> list[str]:
    """Greedy answers, special tokens kept (a tool call is between two of them), left-padded batches."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO, padding_side="left")
    prompts = [prompt_ids(tokenizer, q) for q in asked]

    def compute() -> list[str]:
        model = load(DEMO, dtype)
        texts = [""] * len(asked)
        order = sorted(range(len(asked)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            padded = tokenizer.pad({"input_ids": [prompts[i] for i in rows]}, return_tensors="pt")
            made = model.generate(**padded, max_new_tokens=LONGEST_ANSWER, do_sample=False)
            new = made[:, padded["input_ids"].shape[1] :].tolist()
            for index, ids in zip(rows, new, strict=True):
                ends = tokenizer.eos_token_id in ids
                end = ids.index(tokenizer.eos_token_id) if ends else len(ids)
                texts[index] = tokenizer.decode(ids[:end], skip_special_tokens=False)
        return texts

    return remembered(compute, DEMO, "answers to eos", prompts, LONGEST_ANSWER, dtype=dtype)


def score(asked: list[Question], texts: list[str]) -> int:
    """How many of the texts are right."""
    return sum(is_right(q, t) for q, t in zip(asked, texts, strict=True))


def held_out(count: int) -> list[Question]:
    return questions(seed=2024, n=count)
