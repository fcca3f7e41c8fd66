"""The checkpoints that the suites serve: random ones of different shapes, and the demo model.

Random checkpoints are kept under .cache/, keyed by what they are made of.
"""

import hashlib
import inspect
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests import tiny
from tests.engine_common.engines import REPO, SHARED
from tests.engine_common.shared_cache import made_once

DEMO = REPO / "lfm2_plugin" / "demo" / "model"
VOCAB = 512
CALM = "-calm"

# Tied head, no bias, K=3, theta 1e6; five convolutions to one attention layer, three dense layers.
ALPHA = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 6,
    "layer_types": ["conv", "conv", "full_attention", "conv", "conv", "conv"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_dense_layers": 3,
    "conv_L_cache": 3,
    "conv_bias": False,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 4096,
}
# Untied head, biases, K=4, theta 5e6, heads wider than hidden/heads, one kv head (replicated under
# TP=2), other numbers of experts, weights not renormalised but scaled, attention first.
BETA = {
    **ALPHA,
    "hidden_size": 192,
    "intermediate_size": 320,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 5,
    "layer_types": ["full_attention", "conv", "conv", "full_attention", "conv"],
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "num_dense_layers": 1,
    "conv_L_cache": 4,
    "conv_bias": True,
    "tie_word_embeddings": False,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
}
# Attention and convolutions in both halves, experts in the second only.
STAGED = {
    **ALPHA,
    "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention", "conv"],
}
# Two layers: quick to compile, for tests that ask about one thing.
SMALL = {
    **ALPHA,
    "num_hidden_layers": 2,
    "layer_types": ["conv", "full_attention"],
    "num_dense_layers": 1,
    "num_experts": 4,
}
# Stacks of experts that are not square: a transposed one shows.
SLIM = {**SMALL, "moe_intermediate_size": 96}
SPECS: dict[str, dict[str, Any]] = {
    "alpha": ALPHA,
    "beta": BETA,
    # The same shapes with other weights (the name decides the seed).
    "alpha_other": ALPHA,
    "beta_other": BETA,
    "staged": STAGED,
    "small": SMALL,
    "slim": SLIM,
    # Nothing of beta's that the built-in gets wrong but the head.
    "untied": {**SMALL, "tie_word_embeddings": False},
    "unbiased": {**ALPHA, "use_expert_bias": False},
    "wide_heads": {**SMALL, "head_dim": 64},
    # A conv state that outgrows the smallest attention page with 7 drafts.
    "narrow": {**SMALL, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 1},
}


def checkpoint(name: str) -> Path:
    """Folder of the named checkpoint (config.json and safetensors, float32), made when absent."""
    if name == "demo":
        return DEMO
    if name.endswith(CALM):
        return calmed(checkpoint(name.removesuffix(CALM)))
    return made({"spec": SPECS[name], "seed": len(name)})


def calmed(source: Path) -> Path:
    """The checkpoint with expert biases ten times as large, which then mostly decide the experts.

    In bf16 a rounding often changes the choice of an expert of a random model, in transformers as in
    an engine, and the answer with it; here it rarely can, so that bf16 may be held to a narrow bound.
    """

    def enlarge(tensors):
        for name in [n for n in tensors if n.endswith("expert_bias")]:
            tensors[name] = tensors[name] * 10

    folder = source.with_name(f"{source.name}{CALM}")
    return made_once(folder, lambda partial: altered(source, partial, enlarge))


def made(recipe: dict[str, Any]) -> Path:
    """The folder of a random checkpoint. Transformers writes its version into it, so that is in the key."""
    parts = (json.dumps(recipe, sort_keys=True), inspect.getsource(tiny), version("transformers"))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return made_once(
        SHARED / "checkpoints" / key,
        lambda partial: tiny.make_checkpoint(partial, recipe["seed"], **recipe["spec"]),
    )


def altered(source: Path, target: Path, change=None, config: dict[str, Any] | None = None) -> Path:
    """A copy of a checkpoint with changed tensors (``change`` edits the dict) and config entries.

    Config entries of None are removed.
    """
    from safetensors.torch import load_file, save_file

    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copy(path, target / path.name)
    tensors: dict[str, Any] = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors |= load_file(path)
    if change is not None:
        change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    values = {**json.loads((target / "config.json").read_text()), **(config or {})}
    text = json.dumps({k: v for k, v in values.items() if v is not None}, indent=2)
    (target / "config.json").write_text(text)
    return target
