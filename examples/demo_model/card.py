"""The model card, written from the figures of a training and its measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demo_model.evaluate import HELD_OUT_SEED

_EXAMPLES = {
    "copy": "`Copy: DDZ wood 17B` -> the text",
    "recall": "a value from a list of 3 to 16 pairs",
    "recall_far": "a value that stands more than 200 tokens back, in a list of 56 to 110 pairs",
    "pattern": "`Double each letter: PG`, swap each pair, the next letter of each, go on with a pattern",
    "count_up": "`Count from 50 to 59.`, also backwards",
    "count_letters": "`How many J are in JQJJQR?`",
    "sum": "`What is 33 + 29?`, summands below 50",
    "tool_call": "one call, the right function of up to four, with its arguments",
    "turns": "what an earlier turn said: a fact, the last answer, a tool's result",
}
_TEXT = """# The demo model of lfm2-plugin

An LFM2-MoE of {parameters:,} parameters, trained from scratch on generated tasks with known
answers. It exists so that a server can be checked by what it answers: wrong state, wrong routing or
wrong positions turn right answers into wrong ones. It knows nothing else; do not use it for
anything else.

    from lfm2_plugin.demo import model_path      # this folder, for AutoModelForCausalLM or `vllm serve`
    from lfm2_plugin.demo.tasks import questions, is_right

## Shape

8 layers (conv, conv, attention, conv, twice), hidden size 128, 4 heads of 32 with 2 key-value
heads, convolution width 3, 2 dense layers, then 6 with 16 experts of width 64, 4 per token, chosen
with an expert bias; tied embeddings; rope theta 5e6. Tensors have the names of the published
models; weights are bfloat16 and the expert biases float32 (with values that bfloat16 holds exactly,
so that a loader that casts them selects the same experts). The tokenizer is byte-level BPE with
{vocabulary} tokens and the special tokens of LFM2.5. The chat template renders the LFM2.5 format,
but for today's date in front of a tool list: the same conversation always gives the same prompt.
`generation_config.json` has `top_k` 1, so that servers answer greedily unless a request says
otherwise.

## Accuracy

Greedy generation in transformers {transformers}, {questions} held-out questions per task
(`questions(seed={seed}, ...)`).

| task | what is asked | float32 | bfloat16 |
| --- | --- | --- | --- |
{accuracy}

Training and held-out questions never share content: a checksum of the text to copy, the list, the
two summands and so on decides on which side a question falls.

Weak spots, on the same questions when these weights were made: tool calls always parsed and had the
right values for the right kind of tool, but the function or an argument was often given another
name that training used for it than the one in the list. Sums were mostly wrong, yet within 5 of the
right one. Letters are hardly counted.

## Training

{steps} steps of at most {tokens_a_step} tokens, {tokens:,} tokens in all (the answers alone are
learned), {cpu_minutes:.0f} minutes of CPU time, which took {minutes:.0f} minutes on 2 cores busy with other work,
seed {training_seed}. Muon for the dense projections and Adam for the rest, learning rates level and
then down to zero over the last 40 % of the steps. Conversations of one to twelve turns, at first
none longer than 160 tokens, at last up to 1,100; recall and then tool calls are drawn more often
later on. The expert bias is not learned by gradient: each step moves it towards an even load.

Again, from a clone with lfm2-plugin, torch and transformers installed:

    python examples/train_demo_model.py

A training that was interrupted goes on from its last checkpoint in `.cache/demo_model`. Another
version of torch or another number of threads rounds differently, so its weights differ; the
accuracies should not, much.

## Expert load

Share of the work of each expert on the prompts of 40 held-out questions per task, in percent,
largest first; an even load is 6.2 each.

| layer | experts |
| --- | --- |
{load}
"""


def write_card(folder: Path, figures: dict[str, Any]) -> None:
    """Write ``README.md`` into the model's folder."""
    accuracy = "\n".join(
        f"| {task} | {example} | {figures['float32'][task]:.1%} | {figures['bfloat16'][task]:.1%} |"
        for task, example in _EXAMPLES.items()
    )
    load = "\n".join(
        f"| {layer} | {' '.join(f'{100 * share:.1f}' for share in sorted(shares, reverse=True))} |"
        for layer, shares in figures["expert_load"].items()
    )
    training = figures["training"]
    text = _TEXT.format(
        **{
            name: figures[name]
            for name in ("parameters", "vocabulary", "transformers", "questions")
        },
        seed=HELD_OUT_SEED,
        accuracy=accuracy,
        load=load,
        steps=training["step"],
        tokens=training["tokens"],
        minutes=training["minutes"],
        cpu_minutes=training["cpu_minutes"],
        training_seed=figures["seed"],
        tokens_a_step=figures["tokens_a_step"],
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
