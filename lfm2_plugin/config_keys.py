"""Which entries of a config.json mean nothing for the mathematics, and which are refused because they may.

The engines ignore an entry that they don't know without a word, and so serve a model with a window of attention or a
cap on its logits as one without. Here an entry has to be known: read by :mod:`lfm2_plugin.arch`, harmless by the lists
below, or off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HARMLESS = frozenset(
    [
        # the files and the libraries that wrote them
        "architectures",
        "attn_implementation",
        "auto_map",
        "chunk_size_feed_forward",
        "compression_config",
        "dtype",
        "experts_implementation",
        "finetuning_task",
        "id2label",
        "ignore_keys_at_rope_validation",
        "keys_to_ignore_at_inference",
        "label2id",
        "language",
        "license",
        "model_name",
        "model_type",
        "name_or_path",
        "num_labels",
        "problem_type",
        "quantization",
        "quantization_config",
        "return_dict",
        "sentence_transformers",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
        # tokens
        "bos_token_id",
        "decoder_start_token_id",
        "eos_token_id",
        "pad_token_id",
        "prefix",
        "sep_token_id",
        # training, and what a forward pass returns besides
        "attention_dropout",
        "aux_loss_alpha",
        "classifier_dropout",
        "hidden_dropout",
        "initializer_range",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "resid_pdrop",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "router_z_loss_coef",
        "tie_last_hidden_states",
        # sampling
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_p",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        # how LFM2's first configs came to their sizes and first weights
        "block_auto_adjust_ff_dim",
        "block_ff_dim",
        "block_ffn_dim_multiplier",
        "block_mlp_init_scale",
        "block_multiple_of",
        "block_out_init_scale",
        "block_use_xavier_init",
        "conv_use_xavier_init",
        # heads that the engines put on a model for pooling
        "classifier_from_token",
        "head_dtype",
        "use_sep_token",
    ]
)
"""Whatever the value, the same tokens."""

ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "block_use_swiglu": (True,),
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "moe_layer_freq": (1,),
    "n_group": (0, 1),
    "partial_rotary_factor": (1,),
    "qk_layernorm": (True,),
    "scoring_func": ("sigmoid",),
    "topk_group": (0, 1),
    "use_pos_enc": (True,),
    "use_qk_norm": (True,),
    "use_rope": (True,),
    "use_swiglu": (True,),
}
"""Entries with the values that describe what LFM2-MoE does anyway; others are refused, off or not."""

SAME_AS = {
    "block_dim": "hidden_size",
    "block_norm_eps": "norm_eps",
    "conv_dim": "hidden_size",
    "conv_dim_out": "hidden_size",
    "num_heads": "num_attention_heads",
    "theta": "rope_theta",
    "v_head_dim": "head_dim",
}
"""Second names, of LFM2's first configs mostly, for an entry that has to agree."""

WAY_OUT = (
    "If an entry means nothing for the model, take it out of config.json, or set it to null: --hf-overrides "
    "'{\"NAME\": null}' in vLLM, --json-model-override-args '{\"NAME\": null}' in SGLang"
)


def unknown_entries(values: Mapping[str, Any], read: frozenset[str], config: Any) -> list[str]:
    """The entries that may change the mathematics and that nothing here reads, in words.

    Args:
        values: the entries.
        read: the names that the caller reads.
        config: what the entries came from. What a class of transformers fills in by itself is no entry of the file.
    """
    found = {}
    for name, value in values.items():
        if name in read or name in HARMLESS or name in SAME_AS or name.startswith("_"):
            continue
        if name in ONLY_VALUES:
            if value is not None and value not in ONLY_VALUES[name]:
                found[name] = value
        elif value:
            found[name] = value
    if found and not isinstance(config, Mapping):
        filled_in = _defaults_of(type(config))
        found = {
            name: value
            for name, value in found.items()
            if name in ONLY_VALUES or name not in filled_in or filled_in[name] != value
        }
    return [_in_words(name, value) for name, value in found.items()]


def contradicted_names(values: Mapping[str, Any]) -> list[str]:
    """The second names that disagree with the first, in words."""
    return [
        f"{name} is {values[name]!r} where {first} is {values[first]!r}"
        for name, first in SAME_AS.items()
        if name in values and first in values and values[name] != values[first]
    ]


def _defaults_of(kind: type) -> dict[str, Any]:
    try:
        return kind().to_dict()
    except Exception:  # a class that can't be made without arguments has no defaults
        return {}


def _in_words(name: str, value: Any) -> str:
    if name in ONLY_VALUES:
        known = " or ".join(map(repr, ONLY_VALUES[name]))
        return f"{name} is {value!r}, and LFM2-MoE has {known}"
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{name} is {text}, an entry that lfm2-plugin doesn't know and that may change the model"
