"""The demo model: its questions, its chat format, its files, and that it answers as its card says."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_model.data import batches, encode
from demo_model.evaluate import HELD_OUT_SEED, expert_load, replies
from lfm2_plugin.demo import model_path
from lfm2_plugin.demo.tasks import TASKS, call_text, draw, is_held_out, is_right, questions

ROOT = Path(__file__).parents[2]
SAMPLE = 12  # questions per task
UNLIKELY = 1e-4  # a worse sample than this share of all samples means another model than the card's


@pytest.fixture(scope="module")
def figures():
    return json.loads((model_path() / "figures.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model():
    loaded, report = AutoModelForCausalLM.from_pretrained(
        model_path(), dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return loaded.eval()


# --- what it answers --------------------------------------------------------------------------------


def at_most(right: int, n: int, share: float) -> float:
    """The probability of ``right`` or fewer right answers out of ``n``."""
    return sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(right + 1))


@pytest.mark.parametrize("task", TASKS)
def test_it_answers_as_its_card_says(model, tokenizer, figures, task: str):
    asked = questions(HELD_OUT_SEED + 1, SAMPLE, task)
    texts = replies(model, tokenizer, asked)
    right = sum(map(is_right, asked, texts))
    wrong = [
        (q.answer, text) for q, text in zip(asked, texts, strict=True) if not is_right(q, text)
    ]
    # A share of 1 would make a single wrong answer impossible; the card saw only so many questions.
    share = min(figures["float32"][task], 1 - 1 / figures["questions"])
    assert at_most(right, SAMPLE, share) > UNLIKELY, f"card {share:.1%}; wrong: {wrong}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", ["copy", "recall", "recall_far"])
def test_copying_and_recall_are_learned(figures, dtype: str, task: str):
    assert figures[dtype][task] >= 0.95


def test_a_convolution_that_forgets_is_noticed(model, tokenizer):
    """The same model without what the convolutions remember of earlier tokens."""
    asked = questions(HELD_OUT_SEED + 1, SAMPLE, "copy")
    taps = [layer.conv.conv.weight for layer in model.model.layers if hasattr(layer, "conv")]
    kept = [weight.detach().clone() for weight in taps]
    with torch.no_grad():
        try:
            for weight in taps:
                weight[..., :-1] = 0
            texts = replies(model, tokenizer, asked)
        finally:
            for weight, before in zip(taps, kept, strict=True):
                weight.copy_(before)
    assert not any(map(is_right, asked, texts))


def test_no_expert_is_idle_and_none_does_all(model, tokenizer):
    for layer, shares in expert_load(model, tokenizer, 5, HELD_OUT_SEED + 1).items():
        even = 1 / len(shares)
        assert min(shares) > even / 10, f"layer {layer}: {shares}"
        assert max(shares) < even * 4, f"layer {layer}: {shares}"


def test_the_card_shows_the_figures(figures):
    card = (model_path() / "README.md").read_text()
    for task in TASKS:
        (row,) = (line for line in card.splitlines() if line.startswith(f"| {task} |"))
        assert row.endswith(f"| {figures['float32'][task]:.1%} | {figures['bfloat16'][task]:.1%} |")
    assert f"{figures['training']['tokens']:,} tokens" in card
    assert f"seed {figures['seed']}" in card
    for layer, shares in figures["expert_load"].items():
        assert f"| {layer} | {100 * max(shares):.1f} " in card


# --- its files --------------------------------------------------------------------------------------


def test_files_are_small_and_named_as_published():
    folder = model_path()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8 * 2**20
    with safe_open(folder / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    biases = {name for name in dtypes if name.endswith("expert_bias")}
    assert biases == {f"model.layers.{i}.feed_forward.expert_bias" for i in range(2, 8)}
    assert {dtypes[name] for name in biases} == {"F32"}
    assert {dtype for name, dtype in dtypes.items() if name not in biases} == {"BF16"}
    for expert in range(16):
        for part in ("w1", "w2", "w3"):
            assert f"model.layers.7.feed_forward.experts.{expert}.{part}.weight" in dtypes
    assert "lm_head.weight" not in dtypes


def test_expert_biases_survive_a_cast_to_bfloat16():
    with safe_open(model_path() / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.endswith("expert_bias"):
                bias = file.get_tensor(name)
                assert bias.abs().max() > 0
                assert torch.equal(bias, bias.bfloat16().float())


def test_config_is_laid_out_like_the_published_ones():
    config = json.loads((model_path() / "config.json").read_text())
    assert config["architectures"] == ["Lfm2MoeForCausalLM"]
    assert config["rope_parameters"] == {"rope_theta": 5_000_000.0, "rope_type": "default"}
    assert [config[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [0, 1, 7]
    assert config["layer_types"] == ["conv", "conv", "full_attention", "conv"] * 2


# --- its chat format --------------------------------------------------------------------------------

WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "é"}}


def render(tokenizer, messages, **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_turns(tokenizer):
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert render(tokenizer, messages, add_generation_prompt=True) == (
        "<|startoftext|><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
        "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("said", ["", "Be brief."])
def test_system_and_tools(tokenizer, said: str):
    messages = [{"role": "system", "content": said}, {"role": "user", "content": "Hello"}]
    text = render(tokenizer, messages[not said :], tools=[WEATHER, WEATHER])
    tool = '{"type": "function", "function": {"name": "get_weather", "description": "é"}}'
    start = f"{said}\n\n" if said else ""
    assert text == (
        f"<|startoftext|><|im_start|>system\n{start}List of tools: [{tool}, {tool}]<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n"
    )


def test_tool_calls_and_results(tokenizer):
    first = {"name": "f", "arguments": {"a": "x", "b": 1, "c": True, "d": {"k": [1]}, "e": [1, 2]}}
    calls = [{"type": "function", "function": f} for f in (first, {"name": "g", "arguments": {}})]
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "done"},
    ]
    assert render(tokenizer, messages).endswith(
        "<|im_start|>assistant\n<|tool_call_start|>"
        "[f(a='x', b=1, c=True, d={\"k\": [1]}, e=[1, 2]), g()]<|tool_call_end|><|im_end|>\n"
        "<|im_start|>tool\ndone<|im_end|>\n"
    )


def test_thoughts_are_kept_for_the_last_exchange_only(tokenizer):
    ask, think = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>t</think>a"},
    )
    separate = {"role": "assistant", "thinking": "t", "content": "a"}
    for turn in (think, separate):
        text = render(tokenizer, [ask, turn, ask, turn])
        assert text.count("<think>t</think>a") == 1
        assert text.endswith("<think>t</think>a<|im_end|>\n")
        assert (
            render(tokenizer, [ask, turn, ask, turn], preserve_thinking=True).count("<think>t") == 2
        )


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": [{"type": "image_url"}]}, "text only.*image_url"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            "must be a mapping",
        ),
    ],
)
def test_what_cannot_be_rendered_is_refused(tokenizer, message, text: str):
    with pytest.raises(jinja2.TemplateError, match=text):
        render(tokenizer, [message])


def test_tokens(tokenizer):
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<|pad|>", "<|startoftext|>", "<|im_end|>")]
    assert ids == [0, 1, 7]
    assert tokenizer.encode("a")[0] == 1
    text = "Any text, ÄÖ 漢字 🙂\n\ttabs  and CAPITALS 0123<|tool_call_start|><think>"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    spaced, bare = (tokenizer.encode(t, add_special_tokens=False) for t in (" apple", "apple"))
    assert spaced[1:] == bare
    assert len(bare) == 1


# --- its questions ----------------------------------------------------------------------------------


def test_questions_repeat_and_take_the_tasks_in_turn():
    asked = questions(3, 2 * len(TASKS))
    assert [q.task for q in asked] == [*TASKS, *TASKS]
    assert asked == questions(3, 2 * len(TASKS))
    assert asked != questions(4, 2 * len(TASKS))
    assert {q.task for q in questions(3, 5, "sum")} == {"sum"}
    with pytest.raises(ValueError, match="unknown task 'sums'"):
        questions(3, 1, "sums")


@pytest.mark.parametrize("task", TASKS)
def test_training_never_sees_what_is_held_out(task: str):
    held_out = {q.key for q in questions(1, 300, task)}
    trained = {q.key for q in questions(1, 3000, task, train=True)}
    assert not held_out & trained
    assert all(map(is_held_out, held_out))


def test_far_recall_is_far(tokenizer):
    for q in questions(5, 40, "recall_far"):
        (message,) = q.messages
        key = message["content"].rstrip(".?").rsplit(" ", 1)[1]
        words = message["content"].replace(",", " ").replace(";", " ").split()
        at = next(i for i, w in enumerate(words) if w == key and words[i + 1] in ("=", ":", "is"))
        assert words[at + 2].rstrip(".") == q.answer
        behind = message["content"].split(f"{key} {words[at + 1]} {words[at + 2]}", 1)[1]
        assert len(tokenizer.encode(behind, add_special_tokens=False)) >= 200


def test_tool_calls_are_pythonic_and_fit_the_tool_list():
    for q in questions(6, 60, "tool_call"):
        text = q.answer.removeprefix("<|tool_call_start|>").removesuffix("<|tool_call_end|>")
        (call,) = ast.parse(text, mode="eval").body.elts
        (schema,) = (t["function"] for t in q.tools if t["function"]["name"] == call.func.id)
        arguments = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        assert list(arguments) == schema["parameters"]["required"]
        for name, value in arguments.items():
            kind = schema["parameters"]["properties"][name]["type"]
            assert isinstance(value, {"string": str, "integer": int}[kind])
        assert call_text(call.func.id, arguments) == q.answer


def test_right_and_wrong():
    (call,) = questions(6, 1, "tool_call")
    assert is_right(call, call.answer)
    assert is_right(call, f" {call.answer}<|im_end|>\n")
    assert is_right(call, call.answer.replace("<|tool_call_start|>", ""))
    (count,) = questions(6, 1, "count_letters")
    assert is_right(count, count.answer)
    assert not is_right(count, count.answer + "0")
    assert not is_right(count, "")


def test_the_answers_alone_are_learned(tokenizer):
    text = render(
        tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}] * 2
    )
    ids, learned = encode(tokenizer, text)
    kept = [token for token, keep in zip(ids, learned, strict=True) if keep]
    assert tokenizer.decode(kept) == "Yes<|im_end|>Yes<|im_end|>"


def test_training_batches_repeat(tokenizer):
    first, again = (batches(tokenizer, 1, 0, 2048) for _ in range(2))
    assert all(
        torch.equal(a, b)
        for x, y in zip(first, again, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert all(ids.numel() <= 2048 and ids.shape[1] < 160 for ids, _ in first)


def test_every_task_is_trained():
    import random

    rng = random.Random(0)
    assert {draw(rng, task, train=True).task for task in TASKS} == set(TASKS)


def test_questions_need_the_standard_library_only():
    code = "import sys, lfm2_plugin.demo.tasks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_missing_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import lfm2_plugin.demo as demo

    monkeypatch.setattr(demo, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors in .*train_demo_model\.py"):
        model_path()
