"""What transformers says: greedy continuations, and per step how clear each decision was.

Everything is computed in one process without an engine, once per content (checkpoint bytes, prompts,
dtype, length, version of transformers), and kept under .cache/: so vLLM and SGLang are held to the same
reference, and what gives its tokens in one gives them in the other.
"""

import hashlib
import inspect
import json
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from tests.engine_common.engines import SHARED
from tests.engine_common.shared_cache import computed_once

BATCH_TOKENS = 4096  # tokens of one prefill batch
KEPT = Path(__file__).with_name("kept_references")
COMPUTED = SHARED / "reference"
KEEP = os.environ.get("LFM2_TEST_KEEP_REFERENCES") == "1"


@dataclass
class Greedy:
    """One prompt's greedy continuation in transformers.

    tokens: the continuation. logprobs: log-probability of each of its tokens, natural log.
    margins: logit of the chosen token minus the next best one's, per step.
    """

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]


def fingerprint(folder: Path, *parts: object) -> str:
    """Hash of the checkpoint's config and weights, transformers' version, and the other parts."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix == ".safetensors" or path.name == "config.json":
            digest.update(path.name.encode() + path.read_bytes())
    digest.update(json.dumps([version("transformers"), *parts]).encode())
    return digest.hexdigest()[:24]


def remembered(
    compute: Callable[[], list], folder: Path, *parts: object, dtype: torch.dtype = torch.float32
) -> list:
    """What ``compute`` gave for a checkpoint and the other parts, computed once.

    What `make test` asks for in float32 comes with the repository; `make references` writes it. Half precision depends
    on the processor and is computed where it is asked for.
    """
    name = f"{fingerprint(folder, *parts, str(dtype))}.json"
    kept = dtype == torch.float32 and (KEEP or (KEPT / name).exists())
    return computed_once((KEPT if kept else COMPUTED) / name, compute)


def load(folder: Path, dtype: torch.dtype):
    """The checkpoint in transformers, eager attention, evaluation mode."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # matrices this small lose time to a second thread
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


def batches(prompts: list[list[int]]) -> list[list[int]]:
    """Indices of the prompts, grouped by equal length (no padding) into batches."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    groups = []
    for length, indices in by_length.items():
        step = max(1, BATCH_TOKENS // length)
        groups += [indices[i : i + step] for i in range(0, len(indices), step)]
    return groups


@torch.inference_mode()
def decode(model, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """(S, T) prompts -> (S, new_tokens) greedy continuation with the model's own cache."""
    from transformers import DynamicCache

    # transformers 5.24 calls its argument for it "cache", and deprecates the name before.
    known = inspect.signature(model.forward).parameters
    cache = {"cache" if "cache" in known else "past_key_values": DynamicCache(config=model.config)}
    step, made = ids, []
    for _ in range(new_tokens):
        out = model(step, **cache, use_cache=True, logits_to_keep=1)
        step = out.logits[:, -1].argmax(-1, keepdim=True)
        made.append(step)
    return torch.cat(made, dim=1)


@torch.inference_mode()
def score(model, ids: torch.Tensor, tail: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One plain forward of (S, T) ids -> for the last ``tail`` tokens of each row: the greedy choice,
    its margin over the runner-up, and the log-probability of the token that is there, all (S, tail).
    """
    logits = model(ids, use_cache=False, logits_to_keep=tail + 1).logits[:, :-1].float()
    best = logits.topk(2, dim=-1)
    there = logits.log_softmax(-1).gather(-1, ids[:, -tail:, None])[..., 0]
    return best.indices[..., 0], best.values[..., 0] - best.values[..., 1], there


def rounded(values: torch.Tensor) -> list[float]:
    """As many digits as float32 has, so that a file holds no others."""
    return [float(f"{value:.7g}") for value in values.tolist()]


def greedy(folder: Path, prompts: list[list[int]], new_tokens: int) -> list[Greedy]:
    """float32 greedy continuations; decoding with the cache must equal one plain forward."""

    def compute() -> list[dict]:
        model = load(folder, torch.float32)
        rows: list[dict] = [{}] * len(prompts)
        for group in batches(prompts):
            ids = torch.tensor([prompts[i] for i in group])
            made = decode(model, ids, new_tokens)
            choice, margin, logprob = score(model, torch.cat([ids, made], 1), new_tokens)
            assert torch.equal(choice, made), "transformers disagrees with itself: decode, forward"
            for row, index in enumerate(group):
                scores = (rounded(values[row]) for values in (logprob, margin))
                rows[index] = asdict(Greedy(made[row].tolist(), *scores))
        return rows

    rows = remembered(compute, folder, "greedy", prompts, new_tokens)
    return [Greedy(**row) for row in rows]


@dataclass
class Forced:
    """A model's view of a text: its own choice and the text's log-probability, per step of the tail."""

    choices: list[int]
    logprobs: list[float]


def teacher_forced(
    folder: Path, texts: list[list[int]], tail: int, dtype: torch.dtype
) -> list[Forced]:
    """One forward of each text in the given dtype; the last ``tail`` tokens are looked at."""

    def compute() -> list[dict]:
        model = load(folder, dtype)
        rows: list[dict] = [{}] * len(texts)
        for group in batches(texts):
            choice, _, logprob = score(model, torch.tensor([texts[i] for i in group]), tail)
            for row, index in enumerate(group):
                rows[index] = asdict(Forced(choice[row].tolist(), rounded(logprob[row])))
        return rows

    rows = remembered(compute, folder, "forced", texts, tail, dtype=dtype)
    return [Forced(**row) for row in rows]
