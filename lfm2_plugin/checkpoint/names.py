"""The one table of checkpoint names: what each tensor is called on disk, its shape, and what it is.

Names are those of the Hugging Face hub, experts one by one (``experts.7.w1.weight``); the stacked form
(``experts.gate_up_proj``) is known too. A :class:`Target` says what a tensor is in words that no engine
owns; each engine package turns it into its own parameter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lfm2_plugin.arch import ATTENTION, CONV, Lfm2MoeArch

Shape = tuple[int, ...]

WEIGHT = "weight"

# Scales of a quantised KV cache, which belong to no linear layer, by name below the layer -> the scale.
KV_SCALES = {
    f"self_attn.{place}{kind}_scale": f"{kind}_scale"
    for kind in "qkv"
    for place in ("", "attn.", f"{kind}_proj.")
} | {
    "self_attn.k_proj.output_scale": "k_scale",
    "self_attn.v_proj.output_scale": "v_scale",
    "self_attn.kv_scale": "k_scale",  # one for both, which the engines take from the keys'
}


@dataclass(frozen=True)
class Target:
    """What a tensor of a checkpoint is.

    Attributes:
        layer: decoder layer, or None outside the layers.
        module: "embed_tokens", "embedding_norm", "lm_head"; in a layer "operator_norm", "ffn_norm",
            "self_attn.{qkv_proj,out_proj,q_layernorm,k_layernorm,scales}",
            "conv.{in_proj,conv,out_proj}", "feed_forward.{w13,w2,gate,expert_bias,experts}".
        parameter: "weight", "bias", or what quantisation calls it.
        shard: part of a fused module: "q", "k", "v"; 0 or 1 of w13; "w1", "w2", "w3" of an expert,
            "w13" and "w2" of stacked experts.
        expert: which expert; None for all others and for stacked experts.
    """

    layer: int | None
    module: str
    parameter: str
    shard: str | int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        source: module on disk, below the layer; "*" stands for each expert.
        shape: its weight's shape.
        module, shard: of the Target; module is ``source`` if empty.
        where: in which layers of which models it is.
        bias: its bias's shape, for models with conv_bias.
        linear: a matmul weight, which quantisation may replace.
        bare: the tensor is called as the module, without ".weight".
    """

    source: str
    shape: Callable[[Lfm2MoeArch], Shape]
    module: str = ""
    shard: str | int | None = None
    where: Callable[[Lfm2MoeArch, int], bool] = lambda arch, layer: True
    bias: Callable[[Lfm2MoeArch], Shape] | None = None
    linear: bool = False
    bare: bool = False


def _attention(arch: Lfm2MoeArch, layer: int) -> bool:
    return arch.layer_types[layer] == ATTENTION


def _conv(arch: Lfm2MoeArch, layer: int) -> bool:
    return arch.layer_types[layer] == CONV


def _dense(arch: Lfm2MoeArch, layer: int) -> bool:
    return layer < arch.num_dense_layers


def _moe(arch: Lfm2MoeArch, layer: int) -> bool:
    return layer >= arch.num_dense_layers


def _biased(arch: Lfm2MoeArch, layer: int) -> bool:
    return _moe(arch, layer) and arch.use_expert_bias


def _hidden(a: Lfm2MoeArch) -> Shape:
    return (a.hidden_size,)


def _head(a: Lfm2MoeArch) -> Shape:
    return (a.head_dim,)


def _vocabulary(a: Lfm2MoeArch) -> Shape:
    return (a.vocab_size, a.hidden_size)


def _query(a: Lfm2MoeArch) -> Shape:
    return (a.num_heads * a.head_dim, a.hidden_size)


def _key(a: Lfm2MoeArch) -> Shape:
    return (a.num_kv_heads * a.head_dim, a.hidden_size)


def _up(a: Lfm2MoeArch) -> Shape:
    return (a.intermediate_size, a.hidden_size)


def _expert_up(a: Lfm2MoeArch) -> Shape:
    return (a.moe_intermediate_size, a.hidden_size)


TOP = (
    Row("model.embed_tokens", _vocabulary, "embed_tokens"),
    Row("model.embedding_norm", _hidden, "embedding_norm"),
)
HEAD = Row("lm_head", _vocabulary, linear=True)
LAYER = (
    Row("operator_norm", _hidden),
    Row("ffn_norm", _hidden),
    Row("self_attn.q_proj", _query, "self_attn.qkv_proj", "q", _attention, linear=True),
    Row("self_attn.k_proj", _key, "self_attn.qkv_proj", "k", _attention, linear=True),
    Row("self_attn.v_proj", _key, "self_attn.qkv_proj", "v", _attention, linear=True),
    Row("self_attn.out_proj", lambda a: _query(a)[::-1], where=_attention, linear=True),
    Row("self_attn.q_layernorm", _head, where=_attention),
    Row("self_attn.k_layernorm", _head, where=_attention),
    Row(
        "conv.in_proj",
        lambda a: (3 * a.hidden_size, a.hidden_size),
        where=_conv,
        bias=lambda a: (3 * a.hidden_size,),
        linear=True,
    ),
    Row("conv.conv", lambda a: (a.hidden_size, 1, a.conv_width), where=_conv, bias=_hidden),
    Row("conv.out_proj", lambda a: _hidden(a) * 2, where=_conv, bias=_hidden, linear=True),
    Row("feed_forward.w1", _up, "feed_forward.w13", 0, _dense, linear=True),
    Row("feed_forward.w3", _up, "feed_forward.w13", 1, _dense, linear=True),
    Row("feed_forward.w2", lambda a: _up(a)[::-1], where=_dense, linear=True),
    Row("feed_forward.gate", lambda a: (a.num_experts, a.hidden_size), where=_moe, linear=True),
    Row("feed_forward.expert_bias", lambda a: (a.num_experts,), where=_biased, bare=True),
)
EXPERTS = "feed_forward.experts"
KV_CACHE = "self_attn.scales"
EXPERT = (
    Row(f"{EXPERTS}.*.w1", _expert_up, EXPERTS, "w1", _moe, linear=True),
    Row(f"{EXPERTS}.*.w3", _expert_up, EXPERTS, "w3", _moe, linear=True),
    Row(f"{EXPERTS}.*.w2", lambda a: _expert_up(a)[::-1], EXPERTS, "w2", _moe, linear=True),
)
STACKED = (
    Row(
        f"{EXPERTS}.gate_up_proj",
        lambda a: (a.num_experts, 2 * a.moe_intermediate_size, a.hidden_size),
        EXPERTS,
        "w13",
        _moe,
        bare=True,
    ),
    Row(
        f"{EXPERTS}.down_proj",
        lambda a: (a.num_experts, a.hidden_size, a.moe_intermediate_size),
        EXPERTS,
        "w2",
        _moe,
        bare=True,
    ),
)

_BY_SOURCE = {row.source: row for row in (*TOP, HEAD, *LAYER, *EXPERT, *STACKED)}
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OF_EXPERT = re.compile(rf"{re.escape(EXPERTS)}\.(\d+)\.(.+)")


def expected_tensors(arch: Lfm2MoeArch, *, stacked: bool = False) -> dict[str, Shape]:
    """Every tensor that a checkpoint of this model must have, name on disk -> shape.

    Args:
        arch: the model.
        stacked: the experts of a layer as one tensor, as transformers 5 holds them in memory.
    """
    tensors = dict(_tensors(TOP, arch))
    if not arch.tie_word_embeddings:
        tensors |= _tensors((HEAD,), arch)
    for layer in range(arch.num_layers):
        rows = (*LAYER, *(STACKED if stacked else EXPERT))
        tensors |= _tensors([row for row in rows if row.where(arch, layer)], arch, layer)
    return tensors


def optional_tensors(arch: Lfm2MoeArch) -> dict[str, Shape]:
    """Tensors that a checkpoint may have without being read: the copy of the embedding in a tied head."""
    return dict(_tensors((HEAD,), arch)) if arch.tie_word_embeddings else {}


def translate(name: str) -> Target | None:
    """What the tensor ``name`` of a checkpoint is, or None if LFM2-MoE has no such tensor."""
    layer = expert = None
    rest = name
    if match := _IN_LAYER.fullmatch(name):
        layer, rest = int(match[1]), match[2]
    if rest in KV_SCALES and layer is not None:
        return Target(layer, KV_CACHE, KV_SCALES[rest])
    if match := _OF_EXPERT.fullmatch(rest):
        expert, rest = int(match[1]), f"{EXPERTS}.*.{match[2]}"
    row, parameter = _BY_SOURCE.get(rest), WEIGHT
    if row is None or not row.bare:
        source, _, parameter = rest.rpartition(".")
        row = _BY_SOURCE.get(source)
        if row is None or row.bare or not _has(row, parameter):
            return None
    if (row in TOP or row is HEAD) != (layer is None):
        return None
    return Target(layer, row.module or row.source, parameter, row.shard, expert)


def is_quantisable(name: str) -> bool:
    """Whether the tensor belongs to a matmul, whose form quantisation may change."""
    target_source = _OF_EXPERT.sub(rf"{EXPERTS}.*.\2", _IN_LAYER.sub(r"\2", name))
    row = _BY_SOURCE.get(target_source.rpartition(".")[0])
    return row is not None and row.linear


def is_kv_scale(name: str) -> bool:
    """Whether the tensor is a scale of a layer's quantised KV cache."""
    match = _IN_LAYER.fullmatch(name)
    return match is not None and match[2] in KV_SCALES


def linear_modules(arch: Lfm2MoeArch) -> list[str]:
    """The modules whose weights are matmuls, by the hub's names; the head too, tied or not."""
    names = {**expected_tensors(arch), **optional_tensors(arch)}
    return [name.removesuffix(f".{WEIGHT}") for name in names if is_quantisable(name)]


def _has(row: Row, parameter: str) -> bool:
    if parameter == "bias":
        return row.bias is not None
    return (
        parameter == WEIGHT or row.linear
    )  # quantisation has tensors of its own beside a matmul's weight


def _tensors(
    rows: tuple[Row, ...] | list[Row], arch: Lfm2MoeArch, layer: int | None = None
) -> Iterator[tuple[str, Shape]]:
    prefix = "" if layer is None else f"model.layers.{layer}."
    for row in rows:
        experts = range(arch.num_experts) if "*" in row.source else (0,)
        for expert in experts:
            module = prefix + row.source.replace("*", str(expert))
            yield (module if row.bare else f"{module}.{WEIGHT}"), row.shape(arch)
            if row.bias is not None and arch.conv_bias:
                yield f"{module}.bias", row.bias(arch)
