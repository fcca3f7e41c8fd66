"""Train the demo model of lfm2-plugin from scratch: seeded, on a CPU, in about half an hour on two cores.

    python examples/train_demo_model.py                     # writes lfm2_plugin/demo/model and its card's figures
    python examples/train_demo_model.py --minutes 2 --out /tmp/pilot

Needs transformers and nothing of an engine. A run that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Lfm2MoeConfig,
    Lfm2MoeForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

import lfm2_plugin.demo
from demo_model import data, evaluate, optimiser
from demo_model.balance import LoadBalancer
from demo_model.card import write_card
from demo_model.tokenizer import VOCAB_SIZE, build_tokenizer

MODEL = Path(lfm2_plugin.demo.__file__).parent / "model"
PATTERN = ["conv", "conv", "full_attention", "conv"]
BALANCE_RATE = 0.003  # what a step adds to or takes from an expert bias
QUICK_SEED = 10_000  # held-out questions for the log; the published figures use others


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=MODEL, help="folder for the model (default: the package's)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(".cache/demo_model"),
        help="folder for checkpoints and the log",
    )
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a step, padding included")
    parser.add_argument(
        "--minutes", type=float, default=0, help="stop after so many minutes, whatever was reached"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--matrix-lr", type=float, default=0.02, help="peak learning rate of the projections (Muon)"
    )
    parser.add_argument(
        "--other-lr", type=float, default=0.003, help="peak learning rate of the rest (Adam)"
    )
    parser.add_argument(
        "--questions",
        type=int,
        default=200,
        help="held-out questions per task of the final measurement",
    )
    return parser.parse_args()


def make_config(tokenizer: PreTrainedTokenizerFast) -> Lfm2MoeConfig:
    """The shape: 3.3 M parameters, laid out as the published models are."""
    return Lfm2MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=64,
        num_hidden_layers=8,
        layer_types=PATTERN * 2,
        num_dense_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=4,
        use_expert_bias=True,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        conv_L_cache=3,
        conv_bias=False,
        tie_word_embeddings=True,
        norm_eps=1e-5,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": 5_000_000.0, "rope_type": "default"},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose merges are learned from the first training conversations."""
    template = MODEL / "chat_template.jinja"
    blank = build_tokenizer([], template)
    rng = Random(f"corpus {seed}")
    made = (data.conversation(rng) for _ in range(6000))
    corpus = [
        blank.apply_chat_template(messages, tools=tools, tokenize=False) for messages, tools in made
    ]
    return build_tokenizer(corpus, template)


def train(
    model: Lfm2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> dict[str, float]:
    """Train in place; returns what it took: steps, tokens and minutes."""
    optimisers = optimiser.build(model, args.matrix_lr, args.other_lr)
    balancer = LoadBalancer(model)
    state = {"step": 0, "tokens": 0, "minutes": 0.0, "cpu_minutes": 0.0, "pool": 0, "used": 0}
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        for made, values in zip(optimisers, saved["optimisers"], strict=True):
            made.load_state_dict(values)
        state |= saved["state"]
        print(f"going on from step {state['step']}", flush=True)
    started = time.monotonic() - 60 * state["minutes"]
    cpu_before = 60 * state["cpu_minutes"] - time.process_time()
    model.train()
    while state["step"] < args.steps and not 0 < args.minutes < state["minutes"]:
        pool = data.batches(tokenizer, args.seed, state["pool"], args.tokens)
        for ids, labels in pool[state["used"] :]:
            factor = optimiser.schedule(optimisers, state["step"], args.steps)
            loss = learn(model, ids, labels, optimisers, balancer, tokenizer.pad_token_id)
            if state["step"] % 100 == 99:
                shares = torch.tensor(list(balancer.shares().values()))
                print(
                    f"   experts' share of a batch: {shares.min():.3f} to {shares.max():.3f}",
                    flush=True,
                )
            balancer.step(rate=BALANCE_RATE * factor)
            state["step"] += 1
            state["used"] += 1
            state["tokens"] += ids.numel()
            state["minutes"] = (time.monotonic() - started) / 60
            state["cpu_minutes"] = (time.process_time() + cpu_before) / 60
            if state["step"] % 20 == 0:
                print(
                    f"step {state['step']} loss {loss:.4f} tokens {state['tokens']} minutes {state['minutes']:.1f}",
                    flush=True,
                )
            if state["step"] % 200 == 0:
                save_checkpoint(checkpoint, model, optimisers, state)
                balancer.counted = None
                report(model, tokenizer)
                balancer.reset()
            if state["step"] >= args.steps or 0 < args.minutes < state["minutes"]:
                break
        else:
            state["pool"] += 1
            state["used"] = 0
    return state


def learn(
    model: Lfm2MoeForCausalLM,
    ids: torch.Tensor,
    labels: torch.Tensor,
    optimisers: list[torch.optim.Optimizer],
    balancer: LoadBalancer,
    pad: int,
) -> float:
    """One optimiser step on a batch of (B, L) int64; returns the loss per learned token."""
    balancer.counted = (ids != pad).flatten()
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    learned = labels != data.IGNORED
    loss = nn.functional.cross_entropy(model.lm_head(hidden[learned]), labels[learned])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for made in optimisers:
        made.step()
        made.zero_grad(set_to_none=True)
    return loss.item()


def report(model: Lfm2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print the accuracy on a few held-out questions of each task."""
    model.eval()
    quick = evaluate.quick_accuracy(model, tokenizer, 40, QUICK_SEED)
    model.train()
    print("   " + " ".join(f"{task} {share:.2f}" for task, share in quick.items()), flush=True)


def save_checkpoint(
    path: Path, model: nn.Module, optimisers: list[torch.optim.Optimizer], state: dict
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    torch.save(
        {
            "model": model.state_dict(),
            "optimisers": [o.state_dict() for o in optimisers],
            "state": state,
        },
        partial,
    )
    partial.replace(path)


def save_model(model: Lfm2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model as the published ones are: weights in bfloat16, expert biases in float32.

    The biases are rounded to bfloat16 values, so that a loader that casts them selects the same
    experts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16)
    for name, bias in model.named_buffers():
        if name.endswith("expert_bias"):
            bias.copy_(bias.to(torch.bfloat16))
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        top_k=1,  # a server that takes its defaults from here answers greedily
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner alone


def measure(folder: Path, n: int) -> dict[str, Any]:
    """Accuracies of a saved model in float32 and bfloat16, and its expert loads on the questions."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    figures: dict[str, Any] = {"questions": n, "vocabulary": len(tokenizer)}
    for dtype in (torch.bfloat16, torch.float32):
        model = Lfm2MoeForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        right = evaluate.accuracy(model, tokenizer, n, evaluate.HELD_OUT_SEED)
        figures[str(dtype).removeprefix("torch.")] = right
        print(dtype, right, flush=True)
        figures["parameters"] = sum(p.numel() for p in model.parameters())
    load = evaluate.expert_load(model, tokenizer, 40, evaluate.HELD_OUT_SEED)
    figures["expert_load"] = {
        layer: [round(share, 4) for share in shares] for layer, shares in load.items()
    }
    return figures


def main() -> None:
    args = arguments()
    logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(args.seed)
    model = Lfm2MoeForCausalLM(make_config(tokenizer))
    model.set_experts_implementation("grouped_mm")
    print(f"{torch.get_num_threads()} threads", flush=True)
    took = train(model, tokenizer, args)
    save_model(model, tokenizer, args.out)
    figures = {
        "transformers": transformers.__version__,
        "seed": args.seed,
        "tokens_a_step": args.tokens,
        "training": {key: took[key] for key in ("step", "tokens", "minutes", "cpu_minutes")},
        **measure(args.out, args.questions),
    }
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    write_card(args.out, figures)


if __name__ == "__main__":
    main()
