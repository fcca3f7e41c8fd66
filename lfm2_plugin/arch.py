"""The shape of an LFM2-MoE model, read from its config and checked once.

Everything downstream (ops, checkpoint tables, memory arithmetic, both engine packages) asks
:class:`Lfm2MoeArch` and never the Hugging Face config, so what a config may look like is known in
this file only.

Dimension letters used in the whole package: T tokens, S sequences, D hidden, K conv width,
H query heads, G key-value heads, P head dim, E experts, A experts per token, F expert width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

MODEL_TYPE = "lfm2_moe"
CONV = "conv"
ATTENTION = "full_attention"
CONV_WIDTHS = range(2, 9)
# transformers 5.17 renames the kinds of layers of a config as it reads it; 5.19 does not.
_RENAMED_LAYER_TYPES = {"linear_attention": CONV, "attention": ATTENTION}

# What the Hugging Face class assumes where a config.json is silent. Sizes and layer_types are not
# among them on purpose: a config without these is broken, and a guessed size shows up much later
# as a wrong shape.
_DEFAULTS: dict[str, Any] = {
    "conv_L_cache": 3,
    "conv_bias": False,
    "max_position_embeddings": 128_000,
    "norm_eps": 1e-5,
    "norm_topk_prob": True,
    "num_dense_layers": 2,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": True,
    "use_expert_bias": True,
}
_DEFAULT_ROPE_THETA = 1e6
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_experts",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)


class UnsupportedConfig(ValueError):
    """The config is not one of an LFM2-MoE model, or it contradicts itself."""


@dataclass(frozen=True)
class Lfm2MoeArch:
    """Sizes and switches of one LFM2-MoE model.

    Attributes:
        hidden_size: D.
        num_layers: decoder layers; each is a short convolution or attention, then a feed-forward.
        layer_types: one of "conv" and "full_attention" per layer.
        num_heads: H.
        num_kv_heads: G; divides H.
        head_dim: P; ``H * P`` need not be D.
        intermediate_size: width of the dense feed-forward.
        moe_intermediate_size: F.
        num_dense_layers: the first layers have a dense feed-forward, the others experts.
        num_experts: E.
        num_experts_per_tok: A.
        norm_topk_prob: the chosen experts' weights are made to sum to 1.
        use_expert_bias: a float32 bias takes part in the choice of experts (never in their weights).
        routed_scaling_factor: multiplies the experts' weights last.
        conv_width: K, tokens that the short convolution sees (``conv_L_cache``).
        conv_bias: convolution and both of its projections have a bias.
        norm_eps: epsilon of every RMSNorm.
        rope_theta: rotary base.
        rope_parameters: the rotary settings in the nested form, always with "rope_type" and "rope_theta".
        vocab_size: V.
        max_position_embeddings: longest context, tokens.
        tie_word_embeddings: the head is the embedding.
    """

    hidden_size: int
    num_layers: int
    layer_types: tuple[str, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    num_dense_layers: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    use_expert_bias: bool
    routed_scaling_factor: float
    conv_width: int
    conv_bias: bool
    norm_eps: float
    rope_theta: float
    rope_parameters: dict[str, Any]
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool

    @classmethod
    def from_config(cls, config: Any) -> Lfm2MoeArch:
        """Read a ``config.json`` (as a mapping) or a Hugging Face config object.

        Raises:
            UnsupportedConfig: another model's config, a missing entry, or entries that contradict each other; the text
                lists everything that is wrong.
        """
        values = _as_dict(config)
        model_type = values.get("model_type")
        if model_type != MODEL_TYPE:
            raise UnsupportedConfig(
                f"This is a config of model_type {model_type!r}; lfm2-plugin serves only {MODEL_TYPE!r} "
                "(LFM2-8B-A1B, LFM2-24B-A2B, LFM2.5-8B-A1B and models of that shape)."
            )
        missing = [name for name in _REQUIRED if values.get(name) is None]
        if missing:
            raise UnsupportedConfig(
                f"The config lacks {', '.join(missing)}. Use the config.json that came with the checkpoint."
            )
        values = {**_DEFAULTS, **{k: v for k, v in values.items() if v is not None}}
        kinds = values["layer_types"]
        values["layer_types"] = [_RENAMED_LAYER_TYPES.get(kind, kind) for kind in kinds]
        rope = _rope_parameters(values)
        problems = _problems(values)
        if problems:
            raise UnsupportedConfig("The config contradicts itself: " + "; ".join(problems) + ".")
        heads = values["num_attention_heads"]
        return cls(
            hidden_size=values["hidden_size"],
            num_layers=values["num_hidden_layers"],
            layer_types=tuple(values["layer_types"]),
            num_heads=heads,
            num_kv_heads=values["num_key_value_heads"],
            head_dim=values.get("head_dim", values["hidden_size"] // heads),
            intermediate_size=values["intermediate_size"],
            moe_intermediate_size=values["moe_intermediate_size"],
            num_dense_layers=values["num_dense_layers"],
            num_experts=values["num_experts"],
            num_experts_per_tok=values["num_experts_per_tok"],
            norm_topk_prob=bool(values["norm_topk_prob"]),
            use_expert_bias=bool(values["use_expert_bias"]),
            routed_scaling_factor=float(values["routed_scaling_factor"]),
            conv_width=values["conv_L_cache"],
            conv_bias=bool(values["conv_bias"]),
            norm_eps=float(values["norm_eps"]),
            rope_theta=rope["rope_theta"],
            rope_parameters=rope,
            vocab_size=values["vocab_size"],
            max_position_embeddings=values["max_position_embeddings"],
            # "tie_embedding" is the name in LFM2's first configs; the Hugging Face class lets it win.
            tie_word_embeddings=bool(values.get("tie_embedding", values["tie_word_embeddings"])),
        )

    @property
    def conv_layers(self) -> tuple[int, ...]:
        """Indices of the layers with a short convolution."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == CONV)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers with attention."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == ATTENTION)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts."""
        return tuple(range(self.num_dense_layers, self.num_layers))

    @property
    def state_len(self) -> int:
        """Values of B*x that a convolution remembers per channel: K - 1."""
        return self.conv_width - 1

    def conv_state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the conv states of one sequence, all layers, without draft tokens."""
        return len(self.conv_layers) * self.state_len * self.hidden_size * dtype.itemsize

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values of one token, all attention layers."""
        per_layer = 2 * self.num_kv_heads * self.head_dim * dtype.itemsize
        return len(self.attention_layers) * per_layer


def _as_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    raise UnsupportedConfig(
        f"Expected a mapping or a Hugging Face config, got {type(config).__name__}."
    )


def _rope_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested form from either form; transformers 4 wrote a flat rope_theta, transformers 5 writes rope_parameters."""
    nested = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    rope_type = nested.pop("rope_type", None) or nested.pop("type", None) or "default"
    nested.pop("type", None)
    theta = nested.pop("rope_theta", None) or values.get("rope_theta") or _DEFAULT_ROPE_THETA
    return {"rope_type": rope_type, "rope_theta": float(theta), **nested}


def _problems(values: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong, in words."""
    sizes = [name for name in _REQUIRED if name != "layer_types"]
    sizes += ["conv_L_cache", "max_position_embeddings", "num_experts_per_tok"]
    sizes += ["head_dim"] if "head_dim" in values else []
    problems = [
        f"{name} is {values[name]!r}, not a positive integer"
        for name in sizes
        if not isinstance(values[name], int) or isinstance(values[name], bool) or values[name] < 1
    ]
    dense = values["num_dense_layers"]
    if not isinstance(dense, int) or dense < 0:
        problems.append(f"num_dense_layers is {dense!r}, not an integer from 0 on")
    if problems:
        return problems

    kinds, layers = list(values["layer_types"]), values["num_hidden_layers"]
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if len(kinds) != layers:
        problems.append(f"layer_types has {len(kinds)} entries for num_hidden_layers {layers}")
    unknown = sorted({str(kind) for kind in kinds} - {CONV, ATTENTION})
    if unknown:
        problems.append(f"layer_types has {', '.join(unknown)}; known are {CONV} and {ATTENTION}")
    if dense > layers:
        problems.append(f"num_dense_layers {dense} is more than num_hidden_layers {layers}")
    if heads % kv_heads:
        problems.append(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if "head_dim" not in values and values["hidden_size"] % heads:
        problems.append(
            f"hidden_size {values['hidden_size']} is no multiple of num_attention_heads {heads}"
        )
    elif values.get("head_dim", values["hidden_size"] // heads) % 2:
        problems.append("the head dim is odd, so the rotary embedding cannot halve it")
    if values["num_experts_per_tok"] > values["num_experts"]:
        problems.append(
            f"num_experts_per_tok {values['num_experts_per_tok']} is more than "
            f"num_experts {values['num_experts']}"
        )
    if values["conv_L_cache"] not in CONV_WIDTHS:
        problems.append(
            f"conv_L_cache {values['conv_L_cache']} is outside {CONV_WIDTHS[0]}..{CONV_WIDTHS[-1]}"
        )
    return problems
