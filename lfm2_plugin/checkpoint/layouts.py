"""Layouts of checkpoints that look like LFM2-MoE and aren't served: recognised by their names, so that an error says
what the files are and not only that a thousand tensors are missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lfm2_plugin.arch import Lfm2MoeArch
from lfm2_plugin.checkpoint.names import Shape


@dataclass(frozen=True)
class Layout:
    """A layout that isn't served.

    Attributes:
        what: what such files are, after "This is".
        remedy: what to do, a sentence.
        shows: whether a tensor of this name and shape occurs in such files only.
    """

    what: str
    remedy: str
    shows: Callable[[str, Shape, Lfm2MoeArch], bool]


def _named(pattern: str) -> Callable[[str, Shape, Lfm2MoeArch], bool]:
    compiled = re.compile(pattern)
    return lambda name, shape, arch: compiled.search(name) is not None


def _is_mlx(name: str, shape: Shape, arch: Lfm2MoeArch) -> bool:
    if name.endswith("conv.conv.weight"):
        return shape == (arch.hidden_size, arch.conv_width, 1)
    return ".switch_mlp." in name or name.endswith(".biases")


def _is_transposed(name: str, shape: Shape, arch: Lfm2MoeArch) -> bool:
    """A square stack shows nothing; of the two kinds at most one is square."""
    experts, width, hidden = arch.num_experts, arch.moe_intermediate_size, arch.hidden_size
    kind = name.removesuffix(".weight").rpartition("experts.")[2]
    right = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}.get(kind)
    return right is not None and right[0] != right[1] and shape == (experts, *right[::-1])


LAYOUTS = (
    Layout(
        "an MLX checkpoint",
        "Serve the original checkpoint that it was converted from; MLX's runs on Apple's GPUs only.",
        _is_mlx,
    ),
    Layout(
        "a checkpoint whose stacks of experts are transposed (experts, inputs, outputs)",
        "Save it with transformers' Lfm2MoeForCausalLM, whose stacks are (experts, outputs, inputs).",
        _is_transposed,
    ),
    Layout(
        "a LoRA adapter and no model",
        "Serve the model that it was trained on, with this adapter (--lora-modules in vLLM, --lora-paths in SGLang).",
        _named(r"\.lora_[AB]\b|\.lora_embedding_[AB]\b"),
    ),
    Layout(
        "a bitsandbytes checkpoint",
        "Serve the original checkpoint, or one quantised by a method that is supported.",
        _named(r"\.(absmax|quant_map|quant_state\.\w+)$"),
    ),
    Layout(
        "a GGUF file's content in safetensors",
        "Serve the original checkpoint that it was converted from.",
        _named(r"^(blk\.\d+|token_embd|output_norm)\."),
    ),
    Layout(
        "the language model of a vision-language checkpoint",
        "Save the language model alone, with names that begin with 'model.' (and 'lm_head.').",
        _named(r"^(model\.)?(language_model|text_model)\."),
    ),
    Layout(
        "a checkpoint with a training wrapper's names",
        "Save the model itself (unwrapped: state_dict() of the module inside).",
        _named(r"^(module|_orig_mod|_fsdp_wrapped_module|base_model\.model)\."),
    ),
    Layout(
        "a checkpoint of the base model without its head (Lfm2MoeModel), whose names lack the prefix 'model.'",
        "Save it from Lfm2MoeForCausalLM.",
        _named(r"^(layers\.\d+|embed_tokens|embedding_norm)\."),
    ),
)


def recognise(tensors: Mapping[str, Shape], arch: Lfm2MoeArch) -> tuple[Layout, list[str]] | None:
    """The first layout that isn't served and that some of the tensors (name -> shape) show, and those tensors."""
    for layout in LAYOUTS:
        witnesses = [name for name, shape in tensors.items() if layout.shows(name, shape, arch)]
        if witnesses:
            return layout, witnesses
    return None
