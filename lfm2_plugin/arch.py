"""The shape of an LFM2-MoE model, read from its config and checked once.

Everything downstream (ops, checkpoint tables, memory arithmetic, both engine packages) asks
:class:`Lfm2MoeArch` and never the Hugging Face config, so what a config may look like is known in
this file only.

Dimension letters used in the whole package: T tokens, S sequences, D hidden, K conv width,
H query heads, G key-value heads, P head dim, E experts, A experts per token, F expert width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .config_keys import WAY_OUT, contradicted_names, unknown_entries
from .config_values import wrong_flags, wrong_lists, wrong_numbers, wrong_sizes
from .rope import read_rope

MODEL_TYPE = "lfm2_moe"
CONV = "conv"
ATTENTION = "full_attention"
CONV_WIDTHS = range(2, 9)
MOST_EXPERTS = 4096  # of a layer: a wrong number would have us list billions of tensors; published models have 64
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
_SIZES = (
    *(name for name in _REQUIRED if name != "layer_types"),
    "conv_L_cache",
    "head_dim",
    "max_position_embeddings",
    "num_experts_per_tok",
)
_NUMBERS = ("norm_eps", "routed_scaling_factor")
_FLAGS = ("conv_bias", "norm_topk_prob", "tie_embedding", "tie_word_embeddings", "use_expert_bias")
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
_READ = frozenset({*_DEFAULTS, *_REQUIRED, *_SIZES, *_FLAGS, *_ROPE, "full_attn_idxs"})


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
    def from_config(cls, config: Any, entries: Mapping[str, Any] | None = None) -> Lfm2MoeArch:
        """Read a ``config.json`` (as a mapping) or a Hugging Face config object.

        Args:
            config: the mapping or the object.
            entries: what the object says, where an engine has changed it; by default its own.

        Raises:
            UnsupportedConfig: another model's config; an entry that is missing, of a wrong type, out of range, unknown,
                or contradicted by another. The text lists all that is wrong.
        """
        given = _as_dict(config) if entries is None else dict(entries)
        model_type = given.get("model_type")
        if model_type != MODEL_TYPE:
            raise UnsupportedConfig(
                f"This is a config of model_type {model_type!r}; lfm2-plugin serves only {MODEL_TYPE!r} "
                "(LFM2-8B-A1B, LFM2-24B-A2B, LFM2.5-8B-A1B and models of that shape)."
            )
        values = {**_DEFAULTS, **{k: v for k, v in given.items() if v is not None}}
        rope, problems = read_rope(values)
        problems = _problems(values) + problems
        unknown = unknown_entries(given, _READ, config)
        if problems or unknown:
            raise UnsupportedConfig(_refusal(problems, unknown))
        heads = values["num_attention_heads"]
        return cls(
            hidden_size=values["hidden_size"],
            num_layers=values["num_hidden_layers"],
            layer_types=tuple(_kinds(values["layer_types"])),
            num_heads=heads,
            num_kv_heads=values["num_key_value_heads"],
            head_dim=values.get("head_dim", values["hidden_size"] // heads),
            intermediate_size=values["intermediate_size"],
            moe_intermediate_size=values["moe_intermediate_size"],
            num_dense_layers=values["num_dense_layers"],
            num_experts=values["num_experts"],
            num_experts_per_tok=values["num_experts_per_tok"],
            norm_topk_prob=values["norm_topk_prob"],
            use_expert_bias=values["use_expert_bias"],
            routed_scaling_factor=float(values["routed_scaling_factor"]),
            conv_width=values["conv_L_cache"],
            conv_bias=values["conv_bias"],
            norm_eps=float(values["norm_eps"]),
            rope_theta=rope["rope_theta"],
            rope_parameters=rope,
            vocab_size=values["vocab_size"],
            max_position_embeddings=values["max_position_embeddings"],
            # "tie_embedding" is the name in LFM2's first configs; the Hugging Face class lets it win.
            tie_word_embeddings=values.get("tie_embedding", values["tie_word_embeddings"]),
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
        f"Expected the entries of a config.json (a mapping) or a Hugging Face config, got {type(config).__name__}."
    )


def _kinds(layer_types: Iterable[str]) -> list[str]:
    return [_RENAMED_LAYER_TYPES.get(kind, kind) for kind in layer_types]


def _refusal(problems: list[str], unknown: list[str]) -> str:
    text = f"The config can't be served right: {'; '.join(problems + unknown)}."
    return f"{text} {WAY_OUT}." if unknown else text


def _problems(values: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong, in words; the rotary settings and unknown entries aside."""
    missing = [name for name in _REQUIRED if name not in values]
    problems = []
    if missing:
        problems.append(
            f"it lacks {', '.join(missing)} (use the config.json that came with the checkpoint)"
        )
    problems += wrong_sizes(values, _SIZES)
    problems += wrong_sizes(values, ["num_dense_layers"], least=0)
    problems += wrong_numbers(values, _NUMBERS)
    problems += wrong_flags(values, _FLAGS)
    problems += wrong_lists(values, ["layer_types"])
    return problems or _contradictions(values)


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """What doesn't fit together in entries that are there and of their types."""
    kinds, layers = _kinds(values["layer_types"]), values["num_hidden_layers"]
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    problems = contradicted_names({"head_dim": values["hidden_size"] // heads, **values})
    dense, indices = values["num_dense_layers"], values.get("full_attn_idxs")
    if len(kinds) != layers:
        problems.append(f"layer_types has {len(kinds)} entries for num_hidden_layers {layers}")
    unknown = sorted(set(kinds) - {CONV, ATTENTION})
    if unknown:
        problems.append(f"layer_types has {', '.join(unknown)}; known are {CONV} and {ATTENTION}")
    if indices is not None and indices != [i for i, k in enumerate(kinds) if k == ATTENTION]:
        problems.append(f"full_attn_idxs {indices!r} are not where layer_types has {ATTENTION}")
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
    if values["num_experts"] > MOST_EXPERTS:
        problems.append(f"num_experts {values['num_experts']} is more than {MOST_EXPERTS}")
    if values["conv_L_cache"] not in CONV_WIDTHS:
        problems.append(
            f"conv_L_cache {values['conv_L_cache']} is outside {CONV_WIDTHS[0]}..{CONV_WIDTHS[-1]}"
        )
    return problems
